"""Where weights come from, rows at a time: files, or random numbers for a model that has none."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Protocol, Self

import numpy
import torch

from engine.weights.checkpoint import ITEM_SIZES, invalid_model
from engine.weights.locate import Located
from engine.weights.tensors import Slice

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS_PER_SEED = 64
_ELEMENTS_PER_READ = 2 << 20


def pieces(part: Slice) -> Iterator[Slice]:
    """A slice's rows, cut so that reading none of them needs more than a buffer of bounded size."""
    step = max(1, _ELEMENTS_PER_READ // max(1, math.prod(part.whole[1:])))
    if step > _ROWS_PER_SEED:
        step -= step % _ROWS_PER_SEED  # or some would be drawn twice
    for start in range(0, len(part.rows), step):
        yield replace(part, rows=part.rows[start : start + step])


def check_finite(values: torch.Tensor, part: Slice, source: Source) -> None:
    """See that all values of a slice are numbers.

    Raises:
        ModelError: INVALID_MODEL, with tensor, file and place of the first that is not.
    """
    finite = values.isfinite()
    if finite.all():
        return
    place = (~finite).nonzero()[0].tolist()
    kind = "NaN" if values[tuple(place)].isnan() else "infinite"
    place[0] += part.rows.start
    if part.columns is not None:
        place[1] += part.columns.start
    raise invalid_model(f"{part.name} in {source.describe(part.name)} is {kind} at {place}")


class Source(Protocol):
    """Weights by name and by place in the whole tensor, so that every layout reads the same numbers."""

    def read(self, part: Slice) -> torch.Tensor:
        """A slice, in the dtype it is stored in; the caller may not keep it."""
        ...

    def describe(self, name: str) -> str:
        """Where a tensor comes from, for people."""
        ...

    def place(self, name: str) -> tuple[str, int]:
        """What to order reads by, so that files are read from beginning to end."""
        ...


class FileSource:
    """Safetensors files, read by offset: a mapped file's pages would count as this process's memory.

    Owns: the open files. Does not own: which tensors are needed.
    """

    def __init__(self, tensors: Mapping[str, Located]) -> None:
        self._tensors = tensors
        self._files: dict[Path, BinaryIO] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def describe(self, name: str) -> str:
        """The file."""
        return str(self._tensors[name].entry.path)

    def place(self, name: str) -> tuple[str, int]:
        """The file and the offset in it."""
        entry = self._tensors[name].entry
        return str(entry.path), entry.start

    def read(self, part: Slice) -> torch.Tensor:
        """Rows from the file, then columns of them.

        Raises:
            ModelError: INVALID_MODEL, when the file has become shorter.
        """
        located = self._tensors[part.name]
        entry, held = located.entry, located.part
        row_bytes = math.prod(entry.shape[1:]) * ITEM_SIZES[entry.dtype]
        size = len(part.rows) * row_bytes
        buffer = torch.empty(size, dtype=torch.uint8)
        file = self._open(entry.path)
        file.seek(entry.start + (part.rows.start - held.rows.start) * row_bytes)
        if size and file.readinto(buffer.numpy()) != size:  # type: ignore[attr-defined] # of unbuffered files
            raise invalid_model(f"{entry.path} is cut short: {part.name} ends before its last row")
        values = buffer.view(_DTYPES[entry.dtype]).view(len(part.rows), *entry.shape[1:])
        if part.columns is None:
            return values
        first = 0 if held.columns is None else held.columns.start
        return values[:, part.columns.start - first : part.columns.stop - first]

    def _open(self, path: Path) -> BinaryIO:
        if path not in self._files:
            self._files[path] = self._undo.enter_context(path.open("rb"))
        return self._files[path]


class DummySource:
    """Random weights that depend on a tensor's name and on the place in it, so that all layouts agree.

    Matrices are uniform with variance 1 / columns, norms 1, biases 0.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor()  # NumPy draws without the interpreter's lock

    def describe(self, name: str) -> str:
        """No file."""
        return "random numbers"

    def place(self, name: str) -> tuple[str, int]:
        """No order is better than another."""
        return "", 0

    def read(self, part: Slice) -> torch.Tensor:
        """Whole groups of rows are drawn, each from its own seed, and cut."""
        if len(part.whole) == 1:
            return torch.full((len(part.rows),), 0.0 if part.name.endswith(".bias") else 1.0)
        columns = part.whole[1]
        first = part.rows.start // _ROWS_PER_SEED
        last = -(-part.rows.stop // _ROWS_PER_SEED)
        scale = math.sqrt(3 / columns) / (1 << 15)
        groups = list(
            self._pool.map(lambda group: self._group(part.name, group, columns), range(first, last))
        )
        values = torch.from_numpy(numpy.concatenate(groups)).float().mul_(scale)
        start = part.rows.start - first * _ROWS_PER_SEED
        values = values[start : start + len(part.rows)]
        return values if part.columns is None else values[:, part.columns.start : part.columns.stop]

    def _group(
        self, name: str, group: int, columns: int
    ) -> numpy.ndarray[tuple[int, int], numpy.dtype[numpy.int16]]:
        seed = hashlib.sha256(f"{name}\0{group}".encode()).digest()
        random = numpy.random.Generator(numpy.random.SFC64(int.from_bytes(seed[:16], "little")))
        values = numpy.frombuffer(random.bytes(2 * _ROWS_PER_SEED * columns), numpy.dtype("<i2"))
        return values.reshape(_ROWS_PER_SEED, columns)
