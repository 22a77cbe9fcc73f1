"""Every architecture in every layout on a real GPU: the log-probabilities of transformers.

Ranks that share one GPU exchange tensors over gloo: this proves that layouts work, not that they are fast.
"""

from __future__ import annotations

import pytest
import torch

from engine import Engine
from engine.request import SamplingParams
from tests.device import GPU
from tests.engine.conftest import MakeModel
from tests.parallel.test_matrix import FAMILIES, LAYOUTS, PROMPTS, model_of
from tests.parallel.transformers_reference import logprobs

pytestmark = pytest.mark.skipif(not GPU, reason="needs a GPU")
TOKENS = 64


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_the_tokens_are_those_of_transformers(make_model: MakeModel, name: str, tp: int, pp: int) -> None:
    model = model_of(make_model, name)
    kv_bytes, greedy = 64 << 20, SamplingParams(temperature=0)
    with Engine(
        str(model), tp=tp, pp=pp, device="cuda", dtype="float32", kv_bytes=kv_bytes, max_running=8
    ) as engine:
        completions = engine.generate(PROMPTS, greedy, max_tokens=TOKENS, ignore_eos=True, logprobs=5)
    for completion in completions:
        prompt = PROMPTS[completion.prompt]
        expected = logprobs(model, (*prompt, *completion.token_ids), torch.float64)
        for position, token in enumerate(completion.token_ids):
            row = expected[len(prompt) - 1 + position]
            assert row[token] >= row.max() - 2e-4, "greedy, up to rounding errors"
            for entry in completion.logprobs[position].top:
                assert abs(entry.logprob - row[entry.token_id]) < 1e-3
