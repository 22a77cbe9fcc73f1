"""The interfaces through which ranks exchange tensors. `Parallel` calls them; each transport implements them.

A tensor parallel group is the ranks of one pipeline stage. A stage link joins a rank to the rank with the
same `tp_rank` in the next stage.
"""

from __future__ import annotations

from typing import Protocol

import torch


class TensorParallelGroup(Protocol):
    """The tensor parallel ranks of one stage. Every rank makes the same calls in the same order."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks. May overwrite `x`."""
        ...

    def gather_columns(self, x_SV: torch.Tensor) -> torch.Tensor:
        """All-gather along the columns: [S, V] of each rank become [S, ranks * V], in rank order."""
        ...

    def leave(self) -> None:
        """Tell the other ranks that this rank ends, if they would notice its end later than this call."""
        ...


class StageLink(Protocol):
    """A one-way connection from a stage to the next. One end sends, the other end receives."""

    def send(self, x: torch.Tensor) -> None:
        """Send a tensor. May return before the tensor has arrived."""
        ...

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Wait for the next tensor."""
        ...

    def leave(self) -> None:
        """Tell the other end that this rank ends, if it would notice the end later than this call."""
        ...
