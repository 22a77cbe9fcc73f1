"""A model directory's files: JSON, safetensors headers, and what tells models apart. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from engine.errors import ModelError

_INDEX = "model.safetensors.index.json"
_WINDOW = 64 << 10
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")


def weight_files(model_dir: str | Path) -> tuple[Path, ...]:
    """The safetensors files of a model: those of the index, else the single file.

    Raises:
        ModelError: INVALID_MODEL, when there are none or some of the index are missing.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise invalid_model(f"{directory} is not a directory")
    index = read_json(directory / _INDEX)
    if index is None:
        single = directory / "model.safetensors"
        if not single.is_file():
            raise invalid_model(f"{directory} has no weights: neither model.safetensors nor {_INDEX}")
        return (single,)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise invalid_model(f"{directory / _INDEX} has no weight_map")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise invalid_model(f"{directory} lacks {', '.join(missing)}, which {_INDEX} names")
    return tuple(directory / name for name in names)


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
            raise invalid_model(f"{path} is cut short or is not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise invalid_model(f"{path} is not a safetensors file") from error
    if not isinstance(header, dict):
        raise invalid_model(f"{path} is not a safetensors file")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_tensor(entry):
            raise invalid_model(f"{path} is not a safetensors file: {name} has no dtype, shape or offsets")
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < 8 + length + end:
        raise invalid_model(f"{path} is cut short: {size} bytes of {8 + length + end}")
    return header


def _is_tensor(entry: object) -> bool:
    match entry:
        case {"dtype": str(), "shape": [*_], "data_offsets": [int(), int()]}:
            return True
    return False


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


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None without the file. Raises ModelError: INVALID_MODEL."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise invalid_model(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise invalid_model(f"{path} is not a JSON object")
    return value


def invalid_model(message: str) -> ModelError:
    """The error of a directory that holds no model that can be run."""
    return ModelError("INVALID_MODEL", message)
