"""Random weights, for a model directory that has only config.json (`load_format: dummy`)."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy
import torch

from engine.weights.source import ROWS_PER_SEED
from engine.weights.tensors import TensorSlice


class DummySource:
    """Implements `source.Source`. Matrices are uniform with variance 1 / columns, norms are 1, biases 0.

    A number depends only on the tensor's name and the place in it, so every layout has the same weights.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor()  # NumPy releases the interpreter lock while it generates

    def describe(self, name: str) -> str:
        """These weights have no file."""
        return "random numbers"

    def order(self, name: str) -> tuple[str, int]:
        """The same for all tensors: the order does not matter."""
        return "", 0

    def read(self, part: TensorSlice) -> torch.Tensor:
        """Generate whole groups of rows, each from its own seed, then cut them."""
        if len(part.whole) == 1:
            return torch.full((len(part.rows),), 0.0 if part.name.endswith(".bias") else 1.0)
        columns = part.whole[1]
        first = part.rows.start // ROWS_PER_SEED
        last = -(-part.rows.stop // ROWS_PER_SEED)
        scale = math.sqrt(3 / columns) / (1 << 15)
        groups = list(
            self._pool.map(lambda group: self._group(part.name, group, columns), range(first, last))
        )
        values = torch.from_numpy(numpy.concatenate(groups)).float().mul_(scale)
        start = part.rows.start - first * ROWS_PER_SEED
        values = values[start : start + len(part.rows)]
        return values if part.columns is None else values[:, part.columns.start : part.columns.stop]

    def _group(
        self, name: str, group: int, columns: int
    ) -> numpy.ndarray[tuple[int, int], numpy.dtype[numpy.int16]]:
        seed = hashlib.sha256(f"{name}\0{group}".encode()).digest()
        random = numpy.random.Generator(numpy.random.SFC64(int.from_bytes(seed[:16], "little")))
        values = numpy.frombuffer(random.bytes(2 * ROWS_PER_SEED * columns), numpy.dtype("<i2"))
        return values.reshape(ROWS_PER_SEED, columns)
