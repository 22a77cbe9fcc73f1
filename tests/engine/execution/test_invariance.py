"""On CPUs a sequence's logits do not depend, to the last bit, on what else the engine does."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.kernels.choose import choose_kernels
from tests.engine.conftest import MakeModel
from tests.engine.harness import Harness

Alone = Callable[[int], torch.Tensor]

LENGTH = 300
TILE = 64  # keys that the kernels take at a time
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


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def alone(odd_model: Path, dtype: torch.dtype) -> Alone:
    """The logits after a number of tokens: one prefill of that length, alone in its step."""
    return functools.cache(lambda end: Harness(odd_model, dtype).step({0: TOKENS[:end]})[0])


def chunks_of(sizes: Iterator[int]) -> Iterator[tuple[int, list[int]]]:
    end = 0
    while end < LENGTH:
        size = next(sizes)
        yield min(end + size, LENGTH), TOKENS[end : end + size]
        end += size


def ends_of(sizes: tuple[int, ...], max_count: int = 12) -> set[int]:
    """Some of the chunks' ends: `max_count` spread evenly, the last, and all next to the end of a tile."""
    ends = [end for end, _ in chunks_of(itertools.cycle(sizes))]
    beside = [end for end in ends if min(end % TILE, -end % TILE) <= 1]
    return {*beside, *ends[:: -(-len(ends) // max_count)], LENGTH}


@pytest.mark.parametrize("sizes", [(1,), (7,), (1, 31, 2, 64), (128, 1), (15, 17)], ids=str)
def test_chunking_does_not_change_a_bit(
    odd_model: Path, alone: Alone, dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    harness = Harness(odd_model, dtype)
    compared = ends_of(sizes)
    assert len(compared) >= 5
    for end, chunk in chunks_of(itertools.cycle(sizes)):
        logits = harness.step({0: chunk})[0]
        if end in compared:
            assert torch.equal(logits, alone(end)), f"after {end} tokens"
    assert end == LENGTH


def test_neighbours_do_not_change_a_bit(odd_model: Path, alone: Alone, dtype: torch.dtype) -> None:
    draw = random.Random(3)
    harness = Harness(odd_model, dtype)
    harness.step({7: [draw.randrange(320) for _ in range(200)]})  # more keys than the sequence tested
    for end, chunk in chunks_of(itertools.cycle((1, 40, 5))):
        others = {n: [draw.randrange(320) for _ in range(draw.choice((1, 1, 3, 20)))] for n in range(1, 8)}
        order = list({0: chunk, **others}.items())
        draw.shuffle(order)
        logits = harness.step(dict(order))[0]
        assert torch.equal(logits, alone(end)), f"after {end} tokens"
    assert end == LENGTH


def test_threads_do_not_change_a_bit(odd_model: Path, alone: Alone, dtype: torch.dtype) -> None:
    kernels = choose_kernels(torch.device("cpu"), dtype, threads=2)
    assert torch.equal(Harness(odd_model, dtype, kernels).step({0: TOKENS})[0], alone(LENGTH))
