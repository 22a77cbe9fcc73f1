"""The shape of a model, read from its config.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.weights.architectures import LayerConfig, architecture
from engine.weights.checkpoint import invalid_model, read_json
from engine.weights.rope_config import RopeConfig, parse_rope


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder. `out_bias`: the output projection of attention has a bias."""

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    rms_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layers: tuple[LayerConfig, ...]
    eos_token_ids: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def kv_window(self) -> int | None:
        """The largest window of the layers: older keys can be freed. None if some layer has no window."""
        windows = [layer.window for layer in self.layers if layer.window is not None]
        return max(windows) if len(windows) == len(self.layers) else None

    @property
    def mlp_sizes(self) -> frozenset[int]:
        """The intermediate sizes of dense layers and of experts, those that occur."""
        return frozenset(
            self.intermediate_size if layer.moe is None else layer.moe.intermediate_size
            for layer in self.layers
        )

    @staticmethod
    def load(model_dir: str | Path, max_model_len: int = 0) -> ModelConfig:
        """Read `config.json` and `generation_config.json`.

        Args:
            model_dir: the model's directory.
            max_model_len: maximum length of a sequence, 0 for the model's own limit. Only models with
                longrope depend on it.

        Raises:
            ModelError: INVALID_MODEL, when the directory holds no model that this engine can run.
        """
        directory = Path(model_dir)
        raw = read_json(directory / "config.json")
        if raw is None:
            raise invalid_model(f"{directory} has no config.json")
        try:
            return _parse(raw, read_json(directory / "generation_config.json") or {}, max_model_len)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise invalid_model(f"{directory / 'config.json'} cannot be read: {error!r}") from error


def check_layout(config: ModelConfig, tp: int, pp: int) -> None:
    """Check that every rank of a layout gets whole heads, whole rows and at least one layer.

    Raises:
        ModelError: INVALID_LAYOUT.
    """
    if tp < 1 or pp < 1:
        raise _invalid_layout(f"TP {tp} and PP {pp} must be at least 1")
    if config.num_heads % tp:
        raise _invalid_layout(f"TP {tp} does not divide the {config.num_heads} attention heads")
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise _invalid_layout(
            f"TP {tp} neither divides nor is a multiple of the {config.num_kv_heads} KV heads"
        )
    for size in sorted(config.mlp_sizes):
        if size % tp:
            raise _invalid_layout(f"TP {tp} does not divide the MLP size {size}")
        if size // tp % 2:
            raise _invalid_layout(
                f"TP {tp} leaves an odd share of the MLP size {size}, which the kernels cannot take"
            )
    if pp > config.num_layers:
        raise _invalid_layout(f"PP {pp} is more than the {config.num_layers} layers")


def _parse(raw: Mapping[str, Any], generation: Mapping[str, Any], max_model_len: int) -> ModelConfig:
    family = architecture(raw)
    raw = {**family.defaults, **raw}
    if raw.get("quantization_config"):
        raise invalid_model("quantised weights are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise invalid_model(f"activation {raw['hidden_act']} is not supported; known: silu")
    heads = int(raw["num_attention_heads"])
    hidden = int(raw["hidden_size"])
    sizes = {
        "vocab_size": int(raw["vocab_size"]),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": int(raw.get("num_key_value_heads") or heads),
        "head_dim": int(raw.get("head_dim") or hidden // heads),
        "intermediate_size": int(raw["intermediate_size"]),
        "max_position": int(raw.get("max_position_embeddings", 2048)),
    }
    for name, size in {**sizes, "num_layers": int(raw["num_hidden_layers"])}.items():
        if size < 1:
            raise invalid_model(f"{name} {size} must be at least 1")
    if heads % sizes["num_kv_heads"]:
        raise invalid_model(f"{heads} attention heads do not share {sizes['num_kv_heads']} KV heads evenly")
    if sizes["head_dim"] % 2:
        raise invalid_model(f"head_dim {sizes['head_dim']} must be even: its halves are rotated")
    rope = parse_rope(raw, family.rope_theta, sizes["max_position"], max_model_len or sizes["max_position"])
    if rope.kind == "yarn":  # yarn configurations state the length before scaling
        sizes["max_position"] = max(sizes["max_position"], int(rope.original_max_position * rope.factor))
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    traits = family.traits(raw)
    return ModelConfig(
        **sizes,
        rms_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=rope,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=traits.qkv_bias,
        out_bias=traits.out_bias,
        mlp_bias=traits.mlp_bias,
        qk_norm=traits.qk_norm,
        layers=traits.layers,
        eos_token_ids=() if eos is None else tuple(map(int, eos)) if isinstance(eos, list) else (int(eos),),
    )


def _invalid_layout(message: str) -> ModelError:
    return ModelError("INVALID_LAYOUT", message)
