"""The files of an ordinary model directory: JSON, and the files that hold the weights. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.errors import ModelError

INDEX = "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json")
_SAMPLE_BYTES = 64 << 10


def weight_files(model_dir: str | Path) -> tuple[Path, ...]:
    """The safetensors files of a model: those that the index names, else the single file.

    Raises:
        ModelError: INVALID_MODEL, when there are none, or a file that the index names is missing.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise invalid_model(f"{directory} is not a directory")
    index = read_json(directory / INDEX)
    if index is None:
        single = directory / "model.safetensors"
        if not single.is_file():
            raise invalid_model(f"{directory} has no weights: neither model.safetensors nor {INDEX}")
        return (single,)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise invalid_model(f"{directory / INDEX} has no weight_map")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise invalid_model(f"{directory} lacks {', '.join(missing)}, which {INDEX} names")
    return tuple(directory / name for name in names)


def weights_digest(files: Iterable[Path]) -> str:
    """A fingerprint of weights: of each file its name, size, header, and three samples of 64 KiB.

    Cheap, and yet it changes when a model of the same shape is trained again.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            digest.update(file.read(length))
            for offset in (0, size // 2, max(0, size - _SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is no file. Raises ModelError: INVALID_MODEL."""
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
    """The error for a directory without a model that this engine can run."""
    return ModelError("INVALID_MODEL", message)
