"""Log-probabilities of prompts against transformers, however the prompt is cut into steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import Engine
from engine.request import PositionLogprobs, SamplingParams

PROMPT = [5 + (i * 7) % 300 for i in range(75)]
GREEDY = SamplingParams(temperature=0)


def scores(engine: Engine, **asked: int) -> list[PositionLogprobs]:
    (first, *_) = engine.generate([PROMPT], GREEDY, max_tokens=2, ignore_eos=True, progress=False, **asked)
    return list(first.prompt_logprobs)


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> torch.Tensor:
    # In float64: with logits as steep as these, two float32 results differ by the sum of their errors.
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)


@pytest.mark.parametrize("max_batch_tokens", [16, 512])
def test_every_token_after_the_first_is_scored(
    model_dir: Path, reference: torch.Tensor, max_batch_tokens: int
) -> None:
    with Engine(
        str(model_dir), threads=1, max_model_len=128, dtype="float32", max_batch_tokens=max_batch_tokens
    ) as engine:
        got = scores(engine, prompt_logprobs=3)
        again = scores(engine, prompt_logprobs=3, n=2)
        none = scores(engine)
    assert [entry.chosen.token_id for entry in got] == PROMPT[1:]
    for position, entry in enumerate(got):
        row = reference[position]
        assert entry.chosen.logprob == pytest.approx(row[PROMPT[position + 1]].item(), abs=1e-4)
        best = row.topk(3)
        assert [token.token_id for token in entry.top] == best.indices.tolist()
        assert [token.logprob for token in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert again == got, "whatever the caches hold by then"
    assert none == []
