"""What a model directory says about the model, and how an engine is laid out. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError

ARCHITECTURES = ("LlamaForCausalLM",)
DTYPES = ("float32", "bfloat16", "float16")
_INDEX = "model.safetensors.index.json"
_WINDOW = 64 << 10
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")


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
        raw = _read_json(directory / "config.json")
        if raw is None:
            raise _invalid(f"{directory} has no config.json")
        try:
            return _parse(raw, _read_json(directory / "generation_config.json") or {})
        except (KeyError, TypeError, ValueError) as error:
            raise _invalid(f"{directory / 'config.json'} cannot be read: {error!r}") from error


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
    block_size: int = 16  # tokens per KV block
    max_batch_tokens: int = 512  # tokens per step, over all sequences
    max_running: int = 64  # sequences that hold KV blocks at once
    kv_bytes: int = 0  # KV memory of one rank: 1 GiB on a CPU, most of what is left on a GPU
    threads: int = 0  # OMP_NUM_THREADS, else cores // ranks

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


def weight_files(model_dir: str | Path) -> tuple[Path, ...]:
    """The safetensors files of a model: those of the index, else the single file.

    Raises:
        ModelError: INVALID_MODEL, when there are none or some of the index are missing.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise _invalid(f"{directory} is not a directory")
    index = _read_json(directory / _INDEX)
    if index is None:
        single = directory / "model.safetensors"
        if not single.is_file():
            raise _invalid(f"{directory} has no weights: neither model.safetensors nor {_INDEX}")
        return (single,)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _invalid(f"{directory / _INDEX} has no weight_map")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise _invalid(f"{directory} lacks {', '.join(missing)}, which {_INDEX} names")
    return tuple(directory / name for name in names)


def check_weights(model_dir: str | Path) -> None:
    """See that the weights are there and whole, by the headers alone.

    Raises:
        ModelError: INVALID_MODEL.
    """
    for path in weight_files(model_dir):
        read_header(path)


def read_header(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file: name to dtype, shape and data_offsets.

    Raises:
        ModelError: INVALID_MODEL, when the file is cut short or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise _invalid(f"{path} is cut short or is not a safetensors file")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise _invalid(f"{path} is not a safetensors file") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < 8 + length + end:
        raise _invalid(f"{path} is cut short: {size} bytes of {8 + length + end}")
    return header


def model_hash(model_dir: str | Path) -> str:
    """The identity of a model: its configuration, tokeniser files, and a sample of its weights.

    Of each weights file the header and three windows are read, so that it is cheap and still tells a
    retrained model of the same shape apart.
    """
    directory = Path(model_dir)
    digest = hashlib.sha256()
    for name in ("config.json", "generation_config.json", *_TOKENIZER_FILES):
        path = directory / name
        digest.update(f"{name}\0".encode())
        digest.update(path.read_bytes() if path.is_file() else b"-")
    for path in weight_files(directory):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        digest.update(json.dumps(read_header(path), sort_keys=True).encode())
        with path.open("rb") as file:
            for offset in (0, size // 2, max(0, size - _WINDOW)):
                file.seek(offset)
                digest.update(file.read(_WINDOW))
    return digest.hexdigest()[:32]


def _parse(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise _invalid(f"architecture {architecture} is not supported; known: {', '.join(ARCHITECTURES)}")
    if raw.get("quantization_config"):
        raise _invalid("quantised weights are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise _invalid(f"activation {raw['hidden_act']} is not supported; known: silu")
    heads = int(raw["num_attention_heads"])
    hidden = int(raw["hidden_size"])
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    return ModelConfig(
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
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
    )


def _parse_rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Transformers 5 has `rope_parameters`; before it, `rope_theta` beside `rope_scaling`."""
    values = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = values.get("rope_type", values.get("type", "default"))
    theta = float(values.get("rope_theta", raw.get("rope_theta", 10000.0)))
    if not math.isfinite(theta) or theta <= 0:
        raise _invalid(f"rope_theta {theta} is not a positive number")
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
    raise _invalid(f"rope type {kind} is not supported; known: default, linear, llama3")


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise _invalid(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _invalid(f"{path} is not a JSON object")
    return value


def _invalid(message: str) -> ModelError:
    return ModelError("INVALID_MODEL", message)


def _layout(message: str) -> ModelError:
    return ModelError("INVALID_LAYOUT", message)
