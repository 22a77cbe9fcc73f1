"""The GPU's draw is the definition's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.draw import Draw, draw_tokens
from engine.kernels.gpu.draw import draw, pack
from engine.request import SamplingParams
from tests.engine.heads import numbers
from tests.gpu.test_kernels import DEVICE

SAMPLINGS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1),
    SamplingParams(temperature=0.3, top_p=0.9),
    SamplingParams(temperature=5, top_p=0.01),
    SamplingParams(temperature=1, top_k=1),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.8),
    SamplingParams(temperature=1.5, min_p=0.1),
    SamplingParams(temperature=100, min_p=0.02, top_k=700, top_p=0.999),
]


def drawn(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    packed = torch.tensor(pack(draws), dtype=torch.int32, device=DEVICE).view(-1, 6)
    return draw(logits.to(DEVICE), packed).tolist()


@pytest.mark.parametrize("shape", ["equal", "peaked", "masked"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_rows_draw_what_the_definition_draws(shape: str, sampling: SamplingParams) -> None:
    logits = numbers(2, 900, seed=9) * 3
    match shape:
        case "equal":
            logits = logits.round()
        case "peaked":
            logits[:, 5] = 60
        case "masked":
            logits[:, ::2] = -torch.inf
    draws = [Draw(replace(sampling, seed=17 * row), 0, row) for row in range(len(logits))]
    assert drawn(logits, draws) == draw_tokens(logits, draws).tolist()


def test_a_vocabulary_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.kernels.gpu.draw._MOST_TILE", 64)
    logits = (numbers(6, 300, seed=3) * 3).round()
    draws = [Draw(replace(sampling, seed=row), 0, row) for row, sampling in enumerate(SAMPLINGS[:6])]
    assert drawn(logits, draws) == draw_tokens(logits, draws).tolist()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_drawing_of_numbers_that_are_none_ends() -> None:
    logits = torch.full((2, 50), torch.nan)
    draws = [Draw(SamplingParams(temperature=t, top_p=0.5), 0, 0) for t in (0.0, 1.0)]
    assert all(0 <= token < 50 for token in drawn(logits, draws))
