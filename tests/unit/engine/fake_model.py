"""A model that is a hash of what the paged cache holds: any mix-up of blocks changes its tokens.

What it keeps of a token depends, like keys and values, on the token, its position and what is kept of every
token in the window before.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

from engine.plan import PENDING_TOKEN, Sampled, SequenceChunk, StepPlan
from engine.plan_codec import decode_plan, encode_plan
from engine.request import PositionLogprobs, TokenLogprob

VOCABULARY = 50
EOS = 0
_NOTHING = 0xDEAD


def kept_of(token: int, position: int, before: Sequence[int]) -> int:
    """What the cache keeps of a token, given what it keeps of those before it in the window."""
    return zlib.crc32(array("I", (token, position, *before)).tobytes())


def kept_of_all(tokens: Sequence[int], window: int | None = None) -> list[int]:
    """What the cache keeps of every token of a sequence."""
    kept: list[int] = []
    for position, token in enumerate(tokens):
        kept.append(kept_of(token, position, kept[_first(position, window) :]))
    return kept


def next_token(tokens: Sequence[int], window: int | None = None) -> int:
    """What follows `tokens`; the end of sequence in about one case of 50."""
    return kept_of_all(tokens, window)[-1] % VOCABULARY


def expected(
    prompt: Sequence[int], max_tokens: int, ignore_eos: bool, window: int | None = None
) -> tuple[list[int], str]:
    """The output of an undisturbed run, and why it ends."""
    kept = kept_of_all(prompt, window)
    output: list[int] = []
    while True:
        output.append(kept[-1] % VOCABULARY)
        if output[-1] == EOS and not ignore_eos:
            return output, "stop"
        if len(output) == max_tokens:
            return output, "length"
        position = len(kept)
        kept.append(kept_of(output[-1], position, kept[_first(position, window) :]))


class FakeRank:
    """Executes plans as a rank does."""

    def __init__(self, block_size: int, window: int | None = None) -> None:
        self._block_size = block_size
        self._window = window
        self._cache: dict[int, list[int]] = {}
        self._tables: dict[int, list[int]] = {}
        self._drawn: dict[int, int] = {}  # by slot, in the last step, if it may be asked for
        self.step = 0
        self.computed_tokens = 0

    def run(self, plan: StepPlan) -> Sampled:
        """Apply the plan; the log-probability of a drawn token is what the cache keeps of the one before."""
        plan = decode_plan(encode_plan(plan))
        assert plan.step == self.step + 1
        self.step = plan.step
        for slot in plan.freed_slots:
            del self._tables[slot]
        for join in plan.new_sequences:
            assert join.slot not in self._tables
            self._tables[join.slot] = []
        sources, targets = {source for source, _ in plan.copies}, [target for _, target in plan.copies]
        assert sources.isdisjoint(targets)
        assert len(set(targets)) == len(targets)
        for source, target in plan.copies:
            self._cache[target] = list(self._cache[source])
        drawn = []
        before, self._drawn = self._drawn, {}
        for row in plan.chunks:
            if PENDING_TOKEN in row.token_ids:
                row = row._replace(token_ids=(*row.token_ids[:-1], before[row.slot]))
            kept = self._compute(row)
            if row.sample:
                drawn.append((kept % VOCABULARY, float(kept)))
                if plan.sample_on_device:
                    self._drawn[row.slot] = kept % VOCABULARY
        self.computed_tokens += plan.tokens
        return Sampled(
            plan.step,
            tuple(token for token, _ in drawn),
            tuple(PositionLogprobs(TokenLogprob(*token)) for token in drawn),
        )

    def _compute(self, row: SequenceChunk) -> int:
        table = self._tables[row.slot]
        table.extend(row.blocks)
        first = _first(row.start, self._window)
        kept = [
            self._slots(table, position)[position % self._block_size] for position in range(first, row.start)
        ]
        for position, token in enumerate(row.token_ids, start=row.start):
            kept.append(kept_of(token, position, kept[_first(position, self._window) - first :]))
            self._slots(table, position)[position % self._block_size] = kept[-1]
        return kept[-1]

    def _slots(self, table: list[int], position: int) -> list[int]:
        block = table[position // self._block_size]
        return self._cache.setdefault(block, [_NOTHING] * self._block_size)


def _first(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)
