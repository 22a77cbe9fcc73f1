"""Every architecture in every layout: the tokens of transformers, and their log-probabilities.

On purpose the KV pool is too small for all sequences, prompts are computed in chunks, one begins like
another, and each is completed twice from shared blocks: none of it may change a token.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.api import Completion
from engine.config import BLOCK_SIZE
from engine.errors import ModelError
from engine.grid import Grid
from engine.request import SamplingParams
from engine.scheduling.scheduler import Scheduler
from engine.weights.model_config import ModelConfig
from engine.weights.shard_model import shard_model
from engine.weights.stages import stage_layers
from tests.engine.conftest import MakeModel
from tests.engine.execution.test_architectures import LLAMA3, MIXTRAL, QWEN3_MOE
from tests.parallel.forked import ForkedEngine

TOKENS = 64
ALTERNATIVES = 20
LONG = [(7 * i * i + 3) % 319 + 1 for i in range(90)]  # longer than the windows of 24
PROMPTS = [[*LONG[:70], 9, 8, 7], [5, 17, 200], [(11 * i + 2) % 319 + 1 for i in range(40)], LONG]
POOL_BLOCKS = 24  # a sequence needs up to 10, and there are 8
WINDOW_BLOCKS = 8  # where it needs up to 6, because what the window has passed is freed
BATCH_TOKENS = 48
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama 3": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
            "num_key_value_heads": 1,
            "vocab_size": 321,
            "num_hidden_layers": 3,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {**MIXTRAL, "sliding_window": 24}),
    "qwen3 moe": ("Qwen3Moe", {**QWEN3_MOE, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
}


@functools.cache
def model_of(make_model: MakeModel, name: str) -> Path:
    family, fields = FAMILIES[name]
    return make_model(family=family, **{"num_hidden_layers": 2, **fields})


@functools.cache
def reference(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@functools.cache
def expected_logprobs(model: Path, token_ids: tuple[int, ...]) -> torch.Tensor:
    """Of every next token at every position, in transformers, all at once and without a cache."""
    with torch.inference_mode():
        return reference(model)(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_the_tokens_are_those_of_transformers(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, name: str, tp: int, pp: int
) -> None:
    model = model_of(make_model, name)
    preempted: list[object] = []
    preempt = Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda *args: preempted.append(args) or preempt(*args))
    with ForkedEngine(
        str(model),
        tp=tp,
        pp=pp,
        threads=1,
        max_batch_tokens=BATCH_TOKENS,
        kv_bytes=pool_bytes(model, tp, pp),
    ) as engine:
        for prompts, tokens in (([LONG], 2), (PROMPTS, TOKENS)):
            completions = engine.generate(
                prompts,
                SamplingParams(temperature=0),
                max_tokens=tokens,
                ignore_eos=True,
                n=2,
                logprobs=ALTERNATIVES,
                progress=False,
            )
            assert [len(completion.token_ids) for completion in completions] == [tokens] * 2 * len(prompts)
            for completion in completions:
                check(model, prompts[completion.prompt], completion)
        assert engine.load.prefix_hits > 0
    assert preempted


def test_random_weights_are_the_same_model_in_every_layout(make_model: MakeModel, tmp_path: Path) -> None:
    config = model_of(make_model, "qwen3 moe") / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    outputs = []
    for tp, pp in LAYOUTS:
        with ForkedEngine(str(tmp_path), tp=tp, pp=pp, threads=1, load_format="dummy") as engine:
            sampling = SamplingParams(temperature=0)
            done = engine.generate(PROMPTS, sampling, max_tokens=8, ignore_eos=True, progress=False)
        outputs.append([completion.token_ids for completion in done])
    assert outputs == outputs[:1] * len(LAYOUTS)


def test_a_sharded_model_runs_as_its_source_does(make_model: MakeModel, tmp_path: Path) -> None:
    source, sharded = model_of(make_model, "llama"), tmp_path / "sharded"
    shard_model(source, sharded, 2, 2)
    outputs = []
    for model in (source, sharded):
        with ForkedEngine(str(model), tp=2, pp=2, threads=1, check_weights=True) as engine:
            sampling = SamplingParams(temperature=0)
            done = engine.generate(PROMPTS, sampling, max_tokens=8, ignore_eos=True, progress=False)
        outputs.append([completion.token_ids for completion in done])
    assert outputs[0] == outputs[1]
    with pytest.raises(ModelError, match="sharded for TP 2 and PP 2, not for TP 1 and PP 1"):
        ForkedEngine(str(sharded))


def check(model: Path, prompt: list[int], completion: Completion) -> None:
    """Greedy: every token is the likeliest after those before it. By induction transformers draws it."""
    logprobs = expected_logprobs(model, (*prompt, *completion.token_ids))[len(prompt) - 1 : -1]
    assert completion.token_ids == logprobs.argmax(dim=-1).tolist()
    told = [[entry.chosen, *entry.top] for entry in completion.logprobs]
    assert {len(entries) for entries in told} == {ALTERNATIVES + 1}
    ids = torch.tensor([[token.token_id for token in entries] for entries in told])
    values = torch.tensor([[token.logprob for token in entries] for entries in told])
    torch.testing.assert_close(values, logprobs.gather(1, ids), rtol=0, atol=1e-4)


def pool_bytes(model: Path, tp: int, pp: int) -> int:
    config = ModelConfig.load(model)
    layers = max(len(stage_layers(config, Grid(tp, pp, rank))) for rank in range(tp * pp))
    block = 2 * layers * max(1, config.num_kv_heads // tp) * config.head_dim * 4 * BLOCK_SIZE
    return block * (POOL_BLOCKS if config.kv_window is None else WINDOW_BLOCKS)
