"""Every architecture in every layout gives the tokens and the log-probabilities of transformers.

On purpose the KV pool is too small for all sequences, prompts are computed in chunks, one prompt begins like
another, and each prompt is completed twice from shared blocks. None of this may change a token.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Engine
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
from tests.parallel.transformers_reference import logprobs

TOKENS = 64
ALTERNATIVES = 20
LONG = [(7 * i * i + 3) % 319 + 1 for i in range(90)]  # longer than the windows of 24
PROMPTS = [[*LONG[:70], 9, 8, 7], [5, 17, 200], [(11 * i + 2) % 319 + 1 for i in range(40)], LONG]
POOL_BLOCKS = 24  # a sequence needs up to 10, and there are 8
WINDOW_BLOCKS = 8  # where a sequence needs up to 6, because blocks behind the window are freed
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


def test_ranks_that_start_as_in_production_generate_the_same(make_model: MakeModel) -> None:
    model = model_of(make_model, "llama")
    with Engine(str(model), tp=2, pp=2, threads=1) as engine:
        completions = engine.generate(
            PROMPTS, SamplingParams(temperature=0), max_tokens=TOKENS, ignore_eos=True, logprobs=ALTERNATIVES
        )
    for completion in completions:
        check(model, PROMPTS[completion.prompt], completion)


def check(model: Path, prompt: list[int], completion: Completion) -> None:
    """Every token is the most likely one, and log-probabilities err as little as those of transformers.

    No fixed tolerance holds on every CPU: how far float32 is from the truth depends on the model, on the
    position, and on the order in which a CPU's library adds. So transformers in float32 is the yardstick,
    over the whole sequence. The root mean square is the sharp limit. The maximum alone depends on chance.
    """
    token_ids, answers = (*prompt, *completion.token_ids), slice(len(prompt) - 1, -1)
    truth = logprobs(model, token_ids, torch.float64)
    assert completion.token_ids == truth[answers].argmax(dim=-1).tolist()
    entries = [[position.chosen, *position.top] for position in completion.logprobs]
    assert {len(tokens) for tokens in entries} == {ALTERNATIVES + 1}
    ids = torch.tensor([[token.token_id for token in tokens] for tokens in entries])
    values = torch.tensor([[token.logprob for token in tokens] for tokens in entries])
    ours = values.double() - truth[answers].gather(1, ids)
    theirs = logprobs(model, token_ids, torch.float32).double() - truth
    assert root_mean_square(ours) <= 2 * root_mean_square(theirs)
    assert ours.abs().max() <= 4 * theirs.abs().max()


def root_mean_square(errors: torch.Tensor) -> float:
    return errors.pow(2).mean().sqrt().item()


def pool_bytes(model: Path, tp: int, pp: int) -> int:
    config = ModelConfig.load(model)
    layers = max(len(stage_layers(config, Grid(tp, pp, rank))) for rank in range(tp * pp))
    block = 2 * layers * max(1, config.num_kv_heads // tp) * config.head_dim * 4 * BLOCK_SIZE
    return block * (POOL_BLOCKS if config.kv_window is None else WINDOW_BLOCKS)
