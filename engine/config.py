"""What a model directory says about the model, and how an engine is laid out. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint import invalid_model, read_header, read_json, weight_files
from engine.errors import ModelError

ARCHITECTURES = ("LlamaForCausalLM",)
BLOCK_SIZE = 16  # tokens per KV block
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("", "int8", "int4")
_WEIGHT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `kind` is "default", "linear" or "llama3"; the rest belongs to the kind."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Llama decoder."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    rms_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]

    @staticmethod
    def load(model_dir: str | Path) -> ModelConfig:
        """Read `config.json` and `generation_config.json`.

        Raises:
            ModelError: INVALID_MODEL, when the directory holds no model that this engine can run.
        """
        directory = Path(model_dir)
        raw = read_json(directory / "config.json")
        if raw is None:
            raise invalid_model(f"{directory} has no config.json")
        try:
            return _parse(raw, read_json(directory / "generation_config.json") or {})
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise invalid_model(f"{directory / 'config.json'} cannot be read: {error!r}") from error


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one rank runs a model. Zero and the empty string let the engine choose."""

    model: str
    tp: int = 1
    pp: int = 1
    rank: int = 0
    epoch: int = 1
    host: str = "127.0.0.1"
    device: str = "cpu"
    dtype: str = ""
    max_model_len: int = 0
    max_batch_tokens: int = 512  # tokens per step, over all sequences
    max_running: int = 64  # sequences that hold KV blocks at once
    # KV memory of one rank: 1 GiB on a CPU, most of what is left on a GPU, divided among the replica's
    # ranks on it. Replicas that share a GPU know nothing of each other and must be given theirs.
    kv_bytes: int = 0
    threads: int = 0  # OMP_NUM_THREADS, else cores // ranks
    quantization: str = ""  # of weights: "", "int8" (a scale per row) or "int4" (per row and 64 columns)

    @property
    def dtype_name(self) -> str:
        """The dtype of weights and activations, chosen by the device where it is not given."""
        return self.dtype or ("float32" if self.device == "cpu" else "bfloat16")


def check_layout(config: ModelConfig, tp: int, pp: int) -> None:
    """See that every rank of `tp` times `pp` gets whole heads, whole rows and at least one layer.

    Raises:
        ModelError: INVALID_LAYOUT.
    """
    if tp < 1 or pp < 1:
        raise _layout(f"TP {tp} and PP {pp} must be at least 1")
    if config.num_heads % tp:
        raise _layout(f"TP {tp} does not divide the {config.num_heads} attention heads")
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise _layout(f"TP {tp} neither divides nor is a multiple of the {config.num_kv_heads} KV heads")
    if config.intermediate_size % tp:
        raise _layout(f"TP {tp} does not divide the MLP size {config.intermediate_size}")
    if pp > config.num_layers:
        raise _layout(f"PP {pp} is more than the {config.num_layers} layers")


def check_weights(model_dir: str | Path) -> None:
    """See that every tensor is there, whole and of the right shape, by the files' headers alone.

    Raises:
        ModelError: INVALID_MODEL, naming the file or tensor.
    """
    config = ModelConfig.load(model_dir)
    found = {
        name: (path, entry) for path in weight_files(model_dir) for name, entry in read_header(path).items()
    }
    for name, shape in tensor_shapes(config).items():
        if name not in found:
            raise invalid_model(f"{model_dir} has no tensor {name}")
        path, entry = found[name]
        if tuple(entry["shape"]) != shape:
            raise invalid_model(f"{name} in {path} has the shape {entry['shape']}, expected {list(shape)}")
        if entry["dtype"] not in _WEIGHT_DTYPES:
            raise invalid_model(f"{name} in {path} has the dtype {entry['dtype']}, which is not supported")


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its name in the files; matrices are [out, in]."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlps = {"gate_proj": (mlp, hidden), "up_proj": (mlp, hidden), "down_proj": (hidden, mlp)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (hidden,)
        for part, matrices, bias in (
            ("self_attn", attention, config.attention_bias),
            ("mlp", mlps, config.mlp_bias),
        ):
            for name, shape in matrices.items():
                shapes[f"{prefix}{part}.{name}.weight"] = shape
                if bias:
                    shapes[f"{prefix}{part}.{name}.bias"] = shape[:1]
    return shapes


def _parse(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise invalid_model(
            f"architecture {architecture} is not supported; known: {', '.join(ARCHITECTURES)}"
        )
    if raw.get("quantization_config"):
        raise invalid_model("quantised weights are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise invalid_model(f"activation {raw['hidden_act']} is not supported; known: silu")
    heads = int(raw["num_attention_heads"])
    hidden = int(raw["hidden_size"])
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    config = ModelConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        intermediate_size=int(raw["intermediate_size"]),
        max_position=int(raw.get("max_position_embeddings", 2048)),
        rms_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_parse_rope(raw),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        eos_token_ids=() if eos is None else tuple(map(int, eos)) if isinstance(eos, list) else (int(eos),),
    )
    for name in (
        "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
        "intermediate_size", "max_position",
    ):  # fmt: skip
        if getattr(config, name) < 1:
            raise invalid_model(f"{name} {getattr(config, name)} must be at least 1")
    return config


def _parse_rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Transformers 5 has `rope_parameters`; before it, `rope_theta` beside `rope_scaling`."""
    values = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = values.get("rope_type", values.get("type", "default"))
    theta = float(values.get("rope_theta", raw.get("rope_theta", 10000.0)))
    if not math.isfinite(theta) or theta <= 0:
        raise invalid_model(f"rope_theta {theta} is not a positive number")
    match kind:
        case "default":
            return RopeConfig(theta)
        case "linear":
            return RopeConfig(theta, kind, float(values["factor"]))
        case "llama3":
            return RopeConfig(
                theta,
                kind,
                float(values["factor"]),
                float(values["low_freq_factor"]),
                float(values["high_freq_factor"]),
                int(values["original_max_position_embeddings"]),
            )
    raise invalid_model(f"rope type {kind} is not supported; known: default, linear, llama3")


def _layout(message: str) -> ModelError:
    return ModelError("INVALID_LAYOUT", message)
