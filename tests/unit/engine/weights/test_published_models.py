"""The published config.json of well-known models, and their published numbers of parameters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.grid import Grid
from engine.weights.model_config import ModelConfig, check_layout
from engine.weights.tensors import rank_slices, tensor_shapes

LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
QWEN_3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7B": (
        LLAMA_2
        | {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
        },
        6_738_415_616,
    ),
    "Llama-2-13B": (
        LLAMA_2
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
        },
        13_015_864_320,
    ),
    "Llama-2-70B": (
        LLAMA_2
        | {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_hidden_layers": 80,
            "num_key_value_heads": 8,
        },
        68_976_648_192,
    ),
    "Llama-3.1-8B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "Mistral-7B-v0.1": (
        MISTRAL | {"rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        MISTRAL | {"rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
        7_248_023_552,
    ),
    "Qwen2.5-7B": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
            "hidden_act": "silu",
            "hidden_size": 3584,
            "initializer_range": 0.02,
            "intermediate_size": 18944,
            "max_position_embeddings": 131072,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "Qwen3-8B": (
        QWEN_3
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_window_layers": 36,
            "model_type": "qwen3",
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
        },
        8_190_735_360,
    ),
    "Mixtral-8x7B": (
        MISTRAL
        | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "vocab_size": 32000,
        },
        46_702_792_704,
    ),
    "Qwen3-30B-A3B": (
        QWEN_3
        | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
        30_532_122_624,
    ),
}


def load(directory: Path, name: str) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(PUBLISHED[name][0]))
    return ModelConfig.load(directory)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameters_add_up_to_the_published_number(tmp_path: Path, name: str) -> None:
    shapes = tensor_shapes(load(tmp_path, name))
    assert sum(map(math.prod, shapes.values())) == PUBLISHED[name][1]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("tp", "pp"), [(4, 1), (2, 2), (1, 8)])
def test_ranks_hold_every_element_once_but_for_norms_and_routers(
    tmp_path: Path, name: str, tp: int, pp: int
) -> None:
    config = load(tmp_path, name)
    check_layout(config, tp, pp)
    held: dict[str, int] = {}
    for rank in range(tp * pp):
        for part in rank_slices(config, Grid(tp, pp, rank)).values():
            held[part.name] = held.get(part.name, 0) + math.prod(part.shape)
    for tensor, shape in tensor_shapes(config).items():
        everywhere = "norm" in tensor or tensor.endswith("mlp.gate.weight")
        everywhere |= tensor.endswith("block_sparse_moe.gate.weight")
        assert held[tensor] == math.prod(shape) * (tp if everywhere else 1), tensor


def test_only_the_first_mistral_looks_through_a_window(tmp_path: Path) -> None:
    windows = {name: load(tmp_path, name).kv_window for name in PUBLISHED}
    assert {name: window for name, window in windows.items() if window} == {"Mistral-7B-v0.1": 4096}


def test_what_else_differs(tmp_path: Path) -> None:
    configs = {name: load(tmp_path, name) for name in PUBLISHED}
    assert [name for name, config in configs.items() if config.qkv_bias] == ["Qwen2.5-7B"]
    assert [name for name, config in configs.items() if config.qk_norm] == ["Qwen3-8B", "Qwen3-30B-A3B"]
    experts = {
        name: (moe.experts, moe.per_token, moe.intermediate_size, moe.normalised)
        for name, config in configs.items()
        if (moe := config.layers[0].moe) is not None
    }
    assert experts == {"Mixtral-8x7B": (8, 2, 14336, True), "Qwen3-30B-A3B": (128, 8, 768, True)}
    assert configs["Llama-3.1-8B"].eos_token_ids == (128001, 128008, 128009)
    assert configs["Llama-3.1-8B"].rope.kind == "llama3"


def test_a_yarn_that_was_switched_on_by_hand_lengthens_the_sequence(tmp_path: Path) -> None:
    """As the model card of Qwen3 says: 40,960 positions become 131,072."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-8B"][0] | {"rope_scaling": scaling}))
    assert ModelConfig.load(tmp_path).max_position == 131072
