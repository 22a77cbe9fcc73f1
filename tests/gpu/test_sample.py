"""The GPU samples the tokens that the definition in torch samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.kernels.gpu.sample import SPEC_INTS, pack, sample
from engine.kernels.sample import SampleSpec, sample_tokens
from engine.request import SamplingParams
from tests.engine.heads import numbers
from tests.engine.logits import SAMPLINGS, scores
from tests.gpu.test_kernels import DEVICE


def sampled(logits: torch.Tensor, specs: list[SampleSpec]) -> list[int]:
    packed = torch.tensor(pack(specs), dtype=torch.int32, device=DEVICE).view(-1, SPEC_INTS)
    return sample(logits.to(DEVICE), packed).tolist()


@pytest.mark.parametrize("shape", ["equal", "peaked", "masked"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_rows_sample_what_the_definition_samples(shape: str, sampling: SamplingParams) -> None:
    logits = scores(shape, 900, rows=2)
    specs = [SampleSpec(replace(sampling, seed=17 * row), 0, row) for row in range(len(logits))]
    assert sampled(logits, specs) == sample_tokens(logits, specs).tolist()


def test_a_vocabulary_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.kernels.gpu.sample.MAX_TILE", 64)
    logits = (numbers(6, 300, seed=3) * 3).round()
    specs = [SampleSpec(replace(sampling, seed=row), 0, row) for row, sampling in enumerate(SAMPLINGS[:6])]
    assert sampled(logits, specs) == sample_tokens(logits, specs).tolist()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_sampling_from_nan_ends() -> None:
    logits = torch.full((2, 50), torch.nan)
    specs = [SampleSpec(SamplingParams(temperature=t, top_p=0.5), 0, 0) for t in (0.0, 1.0)]
    assert all(0 <= token < 50 for token in sampled(logits, specs))
