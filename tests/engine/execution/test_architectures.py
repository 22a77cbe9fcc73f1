"""Every architecture and variant, fed in two chunks, has the logits of transformers."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine import Engine
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.execution.rope import rope_tables
from engine.weights.identity import engine_identity
from engine.weights.model_config import ModelConfig
from tests.engine.conftest import MakeModel
from tests.engine.harness import Harness

PROMPT = [(7 * i * i + 3) % 319 + 1 for i in range(60)]
CHUNK = 33

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 32,
}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.25}
QWEN3_MOE = {
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "head size, one KV head": ("Llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    ),
    "dynamic rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "yarn": ("Llama", {"rope_parameters": YARN, "head_dim": 16}),
    "yarn, not truncated": ("Llama", {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 4.0}}),
    "longrope": ("Llama", {"rope_parameters": LONGROPE}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 with layer types": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "mixtral": ("Mixtral", MIXTRAL | {"sliding_window": 24}),
    "qwen3 moe": ("Qwen3Moe", QWEN3_MOE),
    "qwen3 moe, some layers dense, weights as they are": (
        "Qwen3Moe",
        QWEN3_MOE | {"norm_topk_prob": False, "mlp_only_layers": [3], "decoder_sparse_step": 2},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(make_model: MakeModel, variant: str) -> None:
    family, fields = VARIANTS[variant]
    model = make_model(family=family, **fields)
    harness = Harness(model)
    logits = [harness.step({0: PROMPT[:CHUNK]})[0], harness.step({0: PROMPT[CHUNK:]})[0]]
    expected = [reference_logits(model, PROMPT[:CHUNK]), reference_logits(model, PROMPT)]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_longrope_has_one_set_of_factors_for_all_sequences(make_model: MakeModel) -> None:
    """The short one where no sequence can be longer than the original length."""
    model = make_model(rope_parameters=LONGROPE)
    short, long = (ModelConfig.load(model, length) for length in (32, 33))
    assert list(short.rope.factors) == LONGROPE["short_factor"]
    assert list(long.rope.factors) == LONGROPE["long_factor"] == list(ModelConfig.load(model).rope.factors)
    engine = EngineConfig(str(model))
    assert engine_identity(engine, short) != engine_identity(engine, long)
    table = rope_tables(short.rope, short.head_dim, len(PROMPT))
    rotary = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(model))
    cos, sin = rotary(torch.zeros(1), torch.arange(32)[None])
    for ours, theirs in zip(table, (cos, sin), strict=True):
        assert torch.equal(ours[:32], theirs[0, :, : short.head_dim // 2])


def test_dynamic_rope_is_refused_beyond_the_length_where_it_is_a_function_of_the_position(
    make_model: MakeModel,
) -> None:
    model = make_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ModelError, match=r"exceeds the model's 512 positions; beyond them dynamic RoPE"):
        Engine(str(model), max_model_len=513)


@pytest.mark.parametrize(("family", "fields"), [("Mixtral", MIXTRAL), ("Qwen3Moe", QWEN3_MOE)])
def test_experts_saved_as_one_tensor_are_found(
    make_model: MakeModel, family: str, fields: dict[str, Any]
) -> None:
    apart, fused = (make_model(family=family, fused=each, **fields) for each in (False, True))
    assert torch.equal(Harness(apart).step({0: PROMPT})[0], Harness(fused).step({0: PROMPT})[0])


@pytest.mark.parametrize(
    ("family", "fields"),
    [("Mixtral", MIXTRAL | {"sliding_window": 24}), ("Qwen3Moe", QWEN3_MOE), ("Qwen2", {})],
    ids=["mixtral", "qwen3 moe", "qwen2"],
)
def test_neighbours_and_chunks_do_not_change_a_bit(
    make_model: MakeModel, family: str, fields: dict[str, Any]
) -> None:
    """The experts of other tokens do not matter either."""
    model = make_model(family=family, **{**fields, "num_hidden_layers": 2})
    draw = random.Random(5)
    harness = Harness(model)
    end = 0
    for size in itertools.cycle((1, 17, 2, 9)):
        if end >= len(PROMPT):
            break
        others = {n: [draw.randrange(320) for _ in range(draw.choice((1, 2, 20)))] for n in range(1, 6)}
        order = list({0: PROMPT[end : end + size], **others}.items())
        draw.shuffle(order)
        logits = harness.step(dict(order))[0]
        end = min(end + size, len(PROMPT))
        assert torch.equal(logits, Harness(model).step({0: PROMPT[:end]})[0]), f"after {end} tokens"


def reference_logits(directory: Path, token_ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0, -1]
