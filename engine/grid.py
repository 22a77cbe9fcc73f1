"""The rank grid of a replica: `rank = pp_rank * tp_size + tp_rank`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grid:
    """The place of one rank."""

    tp: int
    pp: int
    rank: int

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp

    @property
    def tp_rank(self) -> int:
        """The column of the grid: which slice of each layer the rank has."""
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        """The row of the grid, the pipeline stage: which layers the rank has."""
        return self.rank // self.tp

    @property
    def is_first_stage(self) -> bool:
        """Whether the rank embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the rank computes logits."""
        return self.pp_rank == self.pp - 1

    @property
    def sampling_rank(self) -> int:
        """The rank that samples tokens: the first of the last stage."""
        return (self.pp - 1) * self.tp
