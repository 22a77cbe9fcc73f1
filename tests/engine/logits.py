"""Logits and sampling parameters, for tests of sampling."""

from __future__ import annotations

import torch

from engine.request import SamplingParams
from tests.engine.heads import numbers


def scores(shape: str, vocabulary: int, rows: int = 24) -> torch.Tensor:
    """Logits of several rows: "random", "equal" (many ties), "peaked" (one far ahead), "masked" (half)."""
    logits = numbers(rows, vocabulary, seed=9) * 3
    match shape:
        case "equal":
            return logits.round()
        case "peaked":
            logits[:, 5] = 60
        case "masked":
            logits[:, ::2] = -torch.inf
    return logits


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
