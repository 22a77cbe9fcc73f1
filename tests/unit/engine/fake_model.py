"""A model that is a hash of what the paged cache holds: any mix-up of blocks changes its tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from engine.plan import Row, Sampled, StepPlan, decode_plan, encode_plan

VOCABULARY = 50
EOS = 0


def next_token(tokens: Sequence[int]) -> int:
    """What follows `tokens`; the end of sequence in about one case of 50."""
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def expected(prompt: Sequence[int], max_tokens: int, ignore_eos: bool) -> tuple[list[int], str]:
    """The output of an undisturbed run, and why it ends."""
    output: list[int] = []
    while True:
        output.append(next_token([*prompt, *output]))
        if output[-1] == EOS and not ignore_eos:
            return output, "stop"
        if len(output) == max_tokens:
            return output, "length"


class FakeRank:
    """Executes plans as a rank does, with token ids for keys and values."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._cache: dict[int, int] = {}
        self._tables: dict[int, list[int]] = {}
        self.step = 0

    def run(self, plan: StepPlan) -> Sampled:
        plan = decode_plan(encode_plan(plan))
        assert plan.step == self.step + 1
        self.step = plan.step
        for handle in plan.leaves:
            del self._tables[handle]
        for join in plan.joins:
            assert join.handle not in self._tables
            self._tables[join.handle] = []
        for row in plan.rows:
            self._tables[row.handle].extend(row.blocks)
        held = [block for table in self._tables.values() for block in table]
        assert len(set(held)) == len(held), "two sequences share a block"
        for row in plan.rows:
            for offset, token in enumerate(row.token_ids):
                self._cache[self._place(row, row.start + offset)] = token
        drawn = tuple(self._draw(row) for row in plan.rows if row.sample)
        return Sampled(plan.step, drawn, (None,) * len(drawn))

    def _draw(self, row: Row) -> int:
        end = row.start + len(row.token_ids)
        return next_token([self._cache[self._place(row, position)] for position in range(end)])

    def _place(self, row: Row, position: int) -> int:
        block = self._tables[row.handle][position // self._block_size]
        return block * self._block_size + position % self._block_size
