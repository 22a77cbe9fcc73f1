"""Greedy float32 tokens equal those of `generate` in transformers, with ranks that start as in production.

`test_matrix` has the other architectures.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import Engine
from engine.request import SamplingParams

PROMPTS = [[(7 * i + 3 * n) % 319 + 1 for i in range(n)] for n in (1, 5, 17, 29, 40, 64, 90, 130)]
TOKENS = 64


def reference(directory: Path, prompts: list[list[int]] = PROMPTS, tokens: int = TOKENS) -> list[list[int]]:
    """What transformers generates, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    outputs = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> list[list[int]]:
    return reference(model_dir)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_layouts_generate_what_transformers_generates(
    model_dir: Path, expected: list[list[int]], tp: int, pp: int
) -> None:
    with Engine(str(model_dir), tp=tp, pp=pp, threads=1) as engine:
        done = engine.generate(PROMPTS, SamplingParams(temperature=0), max_tokens=TOKENS, ignore_eos=True)
    assert [completion.token_ids for completion in done] == expected
