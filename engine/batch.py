"""Turns plans into the tensors of a step.

Owns: what this rank knows of each handle: its block table, where its output begins, how it is sampled.
Does not own: any decision; everything comes from the plans.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from engine.attention import TILE, AttentionGroup
from engine.plan import Join, Row, StepPlan
from engine.sampler import Draw


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's input. T is padded to `min_rows` at least, and so are the rows that sample.

    places_T: where each token's key and value go. sample_rows_S: rows whose next token is drawn; only
    the first `len(draws)` are meant.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    places_T: torch.Tensor
    groups: tuple[AttentionGroup, ...]
    sample_rows_S: torch.Tensor
    draws: tuple[Draw, ...]

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.token_ids_T.shape[0])


@dataclass(slots=True)
class _Handle:
    join: Join
    blocks: list[int] = field(default_factory=list)


def min_rows(dtype: torch.dtype, device: torch.device) -> int:
    """Rows that a matrix product needs for a row's bits not to depend on their number.

    Measured with MKL in float32: from 16 rows on they do not (nor below, in its strict reproducible
    mode, which other libraries lack). Every CPU is given 16 in float32, whatever its library. Other
    types and devices are not padded and promise nothing.
    """
    return 16 if device.type == "cpu" and dtype == torch.float32 else 1


class Batcher:
    """Applies plans in order and builds a Batch from each."""

    def __init__(
        self,
        block_size: int,
        queries_per_kv_head: int,
        padding_place: int,
        min_rows: int,
        device: torch.device,
    ) -> None:
        self._min_rows = min_rows
        self._block_size = block_size
        self._queries_per_kv_head = queries_per_kv_head
        self._padding_place = padding_place
        self._device = device
        self._handles: dict[int, _Handle] = {}

    def build(self, plan: StepPlan) -> Batch:
        """Take in what the plan says about handles and lay out its rows."""
        for handle in plan.leaves:
            del self._handles[handle]
        for join in plan.joins:
            self._handles[join.handle] = _Handle(join)
        token_ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        draws: list[Draw] = []
        sample_rows: list[int] = []
        by_queries: dict[int, list[tuple[int, Row]]] = defaultdict(list)
        for row in plan.rows:
            state = self._handles[row.handle]
            state.blocks.extend(row.blocks)
            end = row.start + len(row.token_ids)
            by_queries[len(row.token_ids)].append((len(token_ids), row))
            token_ids.extend(row.token_ids)
            positions.extend(range(row.start, end))
            places.extend(self._place(state, position) for position in range(row.start, end))
            if row.sample:
                join = state.join
                draws.append(Draw(join.sampling, join.choice, end - join.prompt_len, join.logprobs))
                sample_rows.append(len(token_ids) - 1)
        padding = max(0, self._min_rows - len(token_ids))
        return Batch(
            self._ids(token_ids + [0] * padding),
            self._ids(positions + [0] * padding),
            self._ids(places + [self._padding_place] * padding),
            tuple(self._group(queries, members) for queries, members in by_queries.items()),
            self._ids(sample_rows + [0] * (self._min_rows - len(sample_rows))),
            tuple(draws),
        )

    def _group(self, queries: int, members: list[tuple[int, Row]]) -> AttentionGroup:
        """Sequences with equally many queries, whose first rows in the step are given."""
        lengths = [row.start + queries for _, row in members]
        keys = -(-max(lengths) // TILE) * TILE
        tables = [
            self._keys(self._handles[row.handle], length, keys)
            for (_, row), length in zip(members, lengths, strict=True)
        ]
        firsts_B1 = self._ids([first for first, _ in members])[:, None]
        starts_B1 = self._ids([row.start for _, row in members])[:, None]
        queries_1Q = torch.arange(queries, device=self._device)[None]
        packed = queries * self._queries_per_kv_head
        seen_BM = torch.zeros(
            len(members), max(packed, self._min_rows), dtype=torch.int64, device=self._device
        )
        seen_BM[:, :packed] = (starts_B1 + queries_1Q).repeat_interleave(self._queries_per_kv_head, dim=1)
        mask_BML = torch.arange(keys, device=self._device)[None, None] > seen_BM[:, :, None]
        return AttentionGroup(firsts_B1 + queries_1Q, torch.stack(tables), mask_BML)

    def _keys(self, state: _Handle, length: int, keys: int) -> torch.Tensor:
        """Places of a sequence's first `length` keys, then padding up to `keys`."""
        blocks = self._ids(state.blocks)[:, None] * self._block_size
        places = (blocks + torch.arange(self._block_size, device=self._device)).flatten()[:length]
        return torch.nn.functional.pad(places, (0, keys - length), value=self._padding_place)

    def _place(self, state: _Handle, position: int) -> int:
        return state.blocks[position // self._block_size] * self._block_size + position % self._block_size

    def _ids(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
