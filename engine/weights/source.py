"""The interface through which the loader reads weights: a slice at a time, by tensor name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch

from engine.weights.checkpoint import invalid_model
from engine.weights.tensors import TensorSlice

ROWS_PER_SEED = 64  # of random weights: see dummy_source.py
_ELEMENTS_PER_READ = 2 << 20


class Source(Protocol):
    """Weights by tensor name and place in the whole tensor, so that every layout reads the same numbers."""

    def read(self, part: TensorSlice) -> torch.Tensor:
        """A slice, in the dtype it is stored in. Valid until the next call."""
        ...

    def describe(self, name: str) -> str:
        """Where a tensor comes from, for error messages."""
        ...

    def order(self, name: str) -> tuple[str, int]:
        """A sort key. Reads in this order go through each file from its beginning to its end."""
        ...


def chunks(part: TensorSlice) -> Iterator[TensorSlice]:
    """Cut a slice into groups of rows, so that reading one needs a buffer of bounded size."""
    step = max(1, _ELEMENTS_PER_READ // max(1, math.prod(part.whole[1:])))
    if step > ROWS_PER_SEED:
        step -= step % ROWS_PER_SEED  # else two chunks would both generate the group of rows between them
    for start in range(0, len(part.rows), step):
        yield replace(part, rows=part.rows[start : start + step])


def check_finite(values: torch.Tensor, part: TensorSlice, source: Source) -> None:
    """Check that no value of a slice is NaN or infinite.

    Raises:
        ModelError: INVALID_MODEL, with the tensor, the file, and the place of the first such value.
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
