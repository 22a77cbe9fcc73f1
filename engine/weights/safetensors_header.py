"""Headers of safetensors files: which tensors a file holds, and where their bytes are. Imports no torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.weights.checkpoint import invalid_model

ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, or a slice of one, in a file: row after row from byte `offset` on.

    `first_row` and `first_column` are the place of the slice in the whole tensor; 0 for a whole tensor.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    first_row: int = 0
    first_column: int = 0

    @property
    def item_bytes(self) -> int:
        """Size of an element."""
        return ITEM_SIZES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return self.item_bytes * math.prod(self.shape[1:])


def read_header(path: Path) -> dict[str, StoredTensor]:
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
    tensors = {name: _stored_tensor(path, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length + max((value["data_offsets"][1] for value in header.values()), default=0)
    if size < end:
        raise invalid_model(f"{path} is cut short: {size} bytes of {end}")
    return tensors


def _stored_tensor(path: Path, name: str, value: object, data_start: int) -> StoredTensor:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if all(
            isinstance(extent, int) for extent in shape
        ):
            item_bytes = ITEM_SIZES.get(dtype)
            if item_bytes is not None and end - start != item_bytes * math.prod(shape):
                raise invalid_model(f"{name} in {path} has {end - start} bytes, which do not fit its shape")
            return StoredTensor(path, dtype, tuple(shape), data_start + start)
    raise invalid_model(f"{path} is not a safetensors file: {name} has no dtype, shape or offsets")


def write_header(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
    """Write the header of a safetensors file. The caller then appends the tensors' bytes in this order.

    Args:
        path: the file, which is overwritten.
        tensors: name, dtype and shape of each tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + ITEM_SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data must begin at a multiple of 8
    path.write_bytes(struct.pack("<Q", len(head)) + head)
