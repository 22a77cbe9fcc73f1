"""The GPU's draw is the definition's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.kernels.draw import Draw, draw_tokens
from engine.kernels.gpu.draw import draw, pack
from engine.request import SamplingParams
from tests.engine.heads import numbers
from tests.engine.logits import SAMPLINGS, scores
from tests.gpu.test_kernels import DEVICE


def drawn(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    packed = torch.tensor(pack(draws), dtype=torch.int32, device=DEVICE).view(-1, 6)
    return draw(logits.to(DEVICE), packed).tolist()


@pytest.mark.parametrize("shape", ["equal", "peaked", "masked"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_rows_draw_what_the_definition_draws(shape: str, sampling: SamplingParams) -> None:
    logits = scores(shape, 900, rows=2)
    draws = [Draw(replace(sampling, seed=17 * row), 0, row) for row in range(len(logits))]
    assert drawn(logits, draws) == draw_tokens(logits, draws).tolist()


def test_a_vocabulary_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.kernels.gpu.draw.MOST_TILE", 64)
    logits = (numbers(6, 300, seed=3) * 3).round()
    draws = [Draw(replace(sampling, seed=row), 0, row) for row, sampling in enumerate(SAMPLINGS[:6])]
    assert drawn(logits, draws) == draw_tokens(logits, draws).tolist()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_drawing_of_numbers_that_are_none_ends() -> None:
    logits = torch.full((2, 50), torch.nan)
    draws = [Draw(SamplingParams(temperature=t, top_p=0.5), 0, 0) for t in (0.0, 1.0)]
    assert all(0 <= token < 50 for token in drawn(logits, draws))
