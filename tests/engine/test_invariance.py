"""In float32 a sequence's logits do not depend, to the last bit, on what else the engine does."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import MakeModel
from tests.engine.harness import Harness

LENGTH = 300
TOKENS = [(11 * i * i + 5) % 319 + 1 for i in range(LENGTH)]


@pytest.fixture(scope="module")
def odd_model(make_model: MakeModel) -> Path:
    """Sizes that no vector width divides: 9 heads of 10 over 3 KV heads, MLP 170."""
    return make_model(
        hidden_size=90,
        intermediate_size=170,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=2,
    )


@pytest.fixture(scope="module")
def alone(odd_model: Path) -> dict[int, torch.Tensor]:
    """Logits by number of tokens seen: one prefill of each length, nothing beside it."""
    return {
        end: Harness(odd_model).step({0: TOKENS[:end]})[0] for end in (1, 2, 15, 16, 17, 127, 129, 257, 300)
    }


def chunks_of(sizes: Iterator[int]) -> Iterator[tuple[int, list[int]]]:
    end = 0
    while end < LENGTH:
        size = next(sizes)
        yield min(end + size, LENGTH), TOKENS[end : end + size]
        end += size


@pytest.mark.parametrize("sizes", [(1,), (7,), (1, 31, 2, 64), (128, 1), (15, 17)], ids=str)
def test_chunking_does_not_change_a_bit(
    odd_model: Path, alone: dict[int, torch.Tensor], sizes: tuple[int, ...]
) -> None:
    harness = Harness(odd_model)
    for end, chunk in chunks_of(itertools.cycle(sizes)):
        logits = harness.step({0: chunk})[0]
        if end in alone:
            assert torch.equal(logits, alone[end]), f"after {end} tokens"
    assert end == LENGTH


def test_neighbours_do_not_change_a_bit(odd_model: Path, alone: dict[int, torch.Tensor]) -> None:
    draw = random.Random(3)
    harness = Harness(odd_model)
    for end, chunk in chunks_of(itertools.cycle((1, 40, 5))):
        others = {n: [draw.randrange(320) for _ in range(draw.choice((1, 1, 3, 20)))] for n in range(1, 8)}
        order = list({0: chunk, **others}.items())
        draw.shuffle(order)
        logits = harness.step(dict(order))[0]
        if end in alone:
            assert torch.equal(logits, alone[end]), f"after {end} tokens"
        if end > LENGTH // 2:
            break


def test_threads_do_not_change_a_bit(odd_model: Path, alone: dict[int, torch.Tensor]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits = Harness(odd_model).step({0: TOKENS})[0]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(logits, alone[LENGTH])
