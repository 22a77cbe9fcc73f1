"""The model architectures that this engine runs. A new architecture goes here.

One decoder (`engine/execution/decoder.py`) runs all of them. To add one that differs from a Llama decoder
only in the traits below:

1. Add its entry to `ARCHITECTURES`, under its name in `architectures` of config.json, with the values that
   transformers gives to fields which config.json leaves out.
2. Write its function from config.json to `Traits`, beside `_llama` and the others.
3. Add it to the tests: a variant in tests/engine/execution/test_architectures.py, a family in
   tests/parallel/test_matrix.py, a published config.json in
   tests/unit/engine/weights/test_published_models.py.

An architecture with other tensors also needs their names and shapes in `tensors.py` and `loader.py`;
other sizes in `model_config.py`; another rotary embedding in `rope_config.py`; other arithmetic in the
decoder and, if the kernels lack it, in `engine/kernels/interface.py` and its implementations.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.weights.checkpoint import invalid_model


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """A mixture of experts in place of a layer's MLP.

    `normalised`: the weights of a token's experts are scaled to sum to 1. The names are parts of tensor
    names.
    """

    experts: int
    per_token: int
    intermediate_size: int
    normalised: bool
    block_name: str  # of the mixture in its layer: "mlp" or "block_sparse_moe"
    gate_name: str  # of the matrices of an expert
    up_name: str
    down_name: str


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer.

    `window`: how many keys a query attends to, its own included; None for all. `moe`: None for a dense MLP.
    """

    window: int | None = None
    moe: MoeConfig | None = None


@dataclass(frozen=True, slots=True)
class Traits:
    """What config.json says about a model of some architecture, beyond the sizes that all models have."""

    layers: tuple[LayerConfig, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """How to read a config.json of this architecture.

    `traits` reads the traits. `defaults` and `rope_theta` are the values of fields that config.json
    leaves out.
    """

    traits: Callable[[Mapping[str, Any]], Traits]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope_theta: float = 10000.0


def architecture(raw: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json names.

    Raises:
        ModelError: INVALID_MODEL, with the names of all known architectures.
    """
    name = (raw.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise invalid_model(f"architecture {name} is not supported; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def _llama(raw: Mapping[str, Any]) -> Traits:
    bias = bool(raw.get("attention_bias", False))
    return Traits(_same_layers(raw, LayerConfig()), bias, bias, bool(raw.get("mlp_bias", False)))


def _mistral(raw: Mapping[str, Any]) -> Traits:
    return Traits(_same_layers(raw, LayerConfig(_window(raw))))


def _qwen2(raw: Mapping[str, Any]) -> Traits:
    return Traits(_qwen_windows(raw), qkv_bias=True)


def _qwen3(raw: Mapping[str, Any]) -> Traits:
    bias = bool(raw.get("attention_bias", False))
    return Traits(_qwen_windows(raw), bias, bias, qk_norm=True)


def _mixtral(raw: Mapping[str, Any]) -> Traits:
    experts = int(raw.get("num_local_experts", 8))
    per_token = int(raw.get("num_experts_per_tok", 2))
    moe = MoeConfig(
        experts, per_token, int(raw["intermediate_size"]), True, "block_sparse_moe", "w1", "w3", "w2"
    )
    return Traits(_same_layers(raw, LayerConfig(_window(raw), _check_moe(moe))))


def _qwen3_moe(raw: Mapping[str, Any]) -> Traits:
    """Every `decoder_sparse_step`-th layer has experts, unless `mlp_only_layers` names it."""
    moe = MoeConfig(
        int(raw.get("num_experts", raw.get("num_local_experts", 128))),
        int(raw.get("num_experts_per_tok", 8)),
        int(raw.get("moe_intermediate_size", 768)),
        bool(raw.get("norm_topk_prob", False)),
        "mlp",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    window = _window(raw) if raw.get("use_sliding_window", False) else None
    dense = set(raw.get("mlp_only_layers") or ())
    step = int(raw.get("decoder_sparse_step", 1))
    sparse = [
        moe.experts > 0 and layer not in dense and (layer + 1) % step == 0
        for layer in range(_num_layers(raw))
    ]
    if any(sparse):
        _check_moe(moe)
    bias = bool(raw.get("attention_bias", False))
    layers = tuple(LayerConfig(window, moe if is_sparse else None) for is_sparse in sparse)
    return Traits(layers, bias, bias, qk_norm=True)


def _check_moe(moe: MoeConfig) -> MoeConfig:
    if not 1 <= moe.per_token <= moe.experts:
        raise invalid_model(f"{moe.per_token} experts per token of {moe.experts} cannot be chosen")
    if moe.intermediate_size < 1:
        raise invalid_model(f"moe_intermediate_size {moe.intermediate_size} must be at least 1")
    return moe


def _num_layers(raw: Mapping[str, Any]) -> int:
    return int(raw["num_hidden_layers"])


def _same_layers(raw: Mapping[str, Any], layer: LayerConfig) -> tuple[LayerConfig, ...]:
    return (layer,) * _num_layers(raw)


def _window(raw: Mapping[str, Any]) -> int | None:
    window = raw.get("sliding_window")
    if window is not None and int(window) < 1:
        raise invalid_model(f"sliding_window {window} must be at least 1")
    return None if window is None else int(window)


def _qwen_windows(raw: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    """Windows in the layers that `layer_types` names; without it, from layer `max_window_layers` on."""
    window = _window(raw) if raw.get("use_sliding_window", False) else None
    kinds = raw.get("layer_types")
    if kinds is None:
        first = int(raw.get("max_window_layers", 28))
        return tuple(LayerConfig(window if layer >= first else None) for layer in range(_num_layers(raw)))
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != _num_layers(raw):
        raise invalid_model(
            f"layer_types must say full_attention or sliding_attention for each of {_num_layers(raw)} layers"
        )
    if "sliding_attention" in kinds and window is None:
        raise invalid_model("layer_types has sliding_attention, but no sliding_window is in use")
    return tuple(LayerConfig(window if kind == "sliding_attention" else None) for kind in kinds)


_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(_llama),
    "MistralForCausalLM": Architecture(_mistral, {**_MISTRAL, "sliding_window": 4096}),
    "MixtralForCausalLM": Architecture(_mixtral, {**_MISTRAL, "rms_norm_eps": 1e-5}, rope_theta=1e6),
    "Qwen2ForCausalLM": Architecture(_qwen2, _QWEN),
    "Qwen3ForCausalLM": Architecture(_qwen3, {**_QWEN, "head_dim": 128}),
    "Qwen3MoeForCausalLM": Architecture(_qwen3_moe, {**_QWEN, "num_key_value_heads": 4}),
}
