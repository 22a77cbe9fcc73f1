"""A model directory's files: JSON, safetensors headers, and what tells models apart. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError

INDEX = "model.safetensors.index.json"
CONFIG_FILES = ("config.json", "generation_config.json")
ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_WINDOW = 64 << 10


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor's bytes are: row by row from byte `start` of a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def weight_files(model_dir: str | Path) -> tuple[Path, ...]:
    """The safetensors files of a model: those of the index, else the single file.

    Raises:
        ModelError: INVALID_MODEL, when there are none or some of the index are missing.
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


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name.

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
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length + max((value["data_offsets"][1] for value in header.values()), default=0)
    if size < end:
        raise invalid_model(f"{path} is cut short: {size} bytes of {end}")
    return entries


def _entry(path: Path, name: str, value: object, data: int) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if all(
            isinstance(extent, int) for extent in shape
        ):
            item = ITEM_SIZES.get(dtype)
            if item is not None and end - start != item * math.prod(shape):
                raise invalid_model(f"{name} in {path} has {end - start} bytes, which do not fit its shape")
            return Entry(path, dtype, tuple(shape), data + start)
    raise invalid_model(f"{path} is not a safetensors file: {name} has no dtype, shape or offsets")


def write_header(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
    """Start a safetensors file: its header, after which the bytes of the tensors follow in this order.

    Args:
        path: the file, which is made anew.
        tensors: name, dtype and shape of each.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + ITEM_SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data begins at a multiple of 8
    path.write_bytes(struct.pack("<Q", len(head)) + head)


def weights_digest(files: Iterable[Path]) -> str:
    """What tells weights apart: of each file its name, size, header and three windows.

    Cheap, and still another for a retrained model of the same shape.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            digest.update(file.read(length))
            for offset in (0, size // 2, max(0, size - _WINDOW)):
                file.seek(offset)
                digest.update(file.read(_WINDOW))
    return digest.hexdigest()


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
