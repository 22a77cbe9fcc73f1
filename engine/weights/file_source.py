"""Weights from safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self

import torch

from engine.weights.checkpoint import invalid_model
from engine.weights.safetensors_header import StoredTensor
from engine.weights.tensors import TensorSlice

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FileSource:
    """Implements `source.Source`. Reads at offsets; pages of a mapped file would count as our memory.

    Owns: the open files. Does not own: which tensors are needed.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._files: dict[Path, BinaryIO] = {}
        self._open_files = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open_files.close()

    def describe(self, name: str) -> str:
        """The file."""
        return str(self._tensors[name].path)

    def order(self, name: str) -> tuple[str, int]:
        """The file and the offset in it."""
        tensor = self._tensors[name]
        return str(tensor.path), tensor.offset

    def read(self, part: TensorSlice) -> torch.Tensor:
        """Read whole rows, then take the columns of them.

        Raises:
            ModelError: INVALID_MODEL, when the file has become shorter.
        """
        tensor = self._tensors[part.name]
        size = len(part.rows) * tensor.row_bytes
        buffer = torch.empty(size, dtype=torch.uint8)
        file = self._open(tensor.path)
        file.seek(tensor.offset + (part.rows.start - tensor.first_row) * tensor.row_bytes)
        if size and file.readinto(buffer.numpy()) != size:  # type: ignore[attr-defined] # BinaryIO lacks it
            raise invalid_model(f"{tensor.path} is cut short: {part.name} ends before its last row")
        values = buffer.view(_DTYPES[tensor.dtype]).view(len(part.rows), *tensor.shape[1:])
        if part.columns is None:
            return values
        first = part.columns.start - tensor.first_column
        return values[:, first : first + len(part.columns)]

    def _open(self, path: Path) -> BinaryIO:
        if path not in self._files:
            self._files[path] = self._open_files.enter_context(path.open("rb"))
        return self._files[path]
