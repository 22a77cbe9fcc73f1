"""The rank grid of a replica: `rank = pp_rank * tp_size + tp_rank`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grid:
    """One rank's place."""

    tp: int
    pp: int
    rank: int

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp

    @property
    def tp_rank(self) -> int:
        """The column: which slice of each layer."""
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        """The row: which layers."""
        return self.rank // self.tp

    @property
    def is_first_stage(self) -> bool:
        """Embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Computes logits."""
        return self.pp_rank == self.pp - 1

    @property
    def sampling_rank(self) -> int:
        """The rank that samples tokens: the first of the last stage."""
        return (self.pp - 1) * self.tp
