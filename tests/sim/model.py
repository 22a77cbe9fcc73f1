"""The model of simulated engines: a token is a hash of the tokens before it, seed, choice and position."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

from engine.plan import Sampled, SequenceChunk, StepPlan
from engine.scheduling.limits import Limits

VOCABULARY = 97
EOS = 0
BLOCK_SIZE = 4
MAX_MODEL_LEN = 128
STOP_PIECE = "<7>"
LIMITS = Limits(
    VOCABULARY,
    MAX_MODEL_LEN,
    (EOS,),
    kv_blocks=130,
    block_size=BLOCK_SIZE,
    max_batch_tokens=24,
    max_running=6,
)


def _kept(token: int, before: int) -> int:
    return zlib.crc32(array("I", (token, before)).tobytes())


def draw(kept: int, seed: int, choice: int, position: int) -> int:
    """The token at an output position; `kept` is the hash of all tokens before it (the model's KV)."""
    return zlib.crc32(array("Q", (kept, seed, choice, position)).tobytes()) % VOCABULARY


def expected(
    prompt: Sequence[int], seed: int, choice: int, max_tokens: int, stop: bool
) -> tuple[list[int], str, str]:
    """The tokens, text and finish reason of an undisturbed run. With `stop`, STOP_PIECE ends it."""
    kept = 0
    for token in prompt:
        kept = _kept(token, kept)
    output: list[int] = []
    while True:
        token = draw(kept, seed, choice, len(output))
        output.append(token)
        text = "".join(f"<{token}>" for token in output)
        if stop and f"<{token}>" == STOP_PIECE:
            return output, text.removesuffix(STOP_PIECE), "stop"
        if token == EOS:
            return output, text, "stop"
        if len(output) == max_tokens:
            return output, text, "length"
        kept = _kept(token, kept)


class Rank:
    """Executes plans as the sampling rank does. Its KV cache holds, for each place of a block, a hash."""

    def __init__(self) -> None:
        self._cache: dict[tuple[int, int], int] = {}
        self._tables: dict[int, list[int]] = {}
        self._joins: dict[int, tuple[int, int, int]] = {}  # seed, choice, length of the prompt
        self.step = 0

    def run(self, plan: StepPlan) -> Sampled:
        """Execute a plan."""
        assert plan.step == self.step + 1
        self.step = plan.step
        for slot in plan.freed_slots:
            del self._tables[slot]
        for join in plan.new_sequences:
            self._tables[join.slot] = []
            self._joins[join.slot] = join.sampling.seed, join.choice, join.prompt_len
        for source, target in plan.copies:
            for slot in range(BLOCK_SIZE):
                self._cache[target, slot] = self._cache.get((source, slot), -1)
        kept = [self._compute(row) for row in plan.chunks]
        sampled = [
            self._draw(row, before) for row, before in zip(plan.chunks, kept, strict=True) if row.sample
        ]
        return Sampled(plan.step, tuple(sampled), (None,) * len(sampled))

    def _compute(self, row: SequenceChunk) -> int:
        table = self._tables[row.slot]
        table.extend(row.blocks)
        start = row.start
        before = self._cache[table[(start - 1) // BLOCK_SIZE], (start - 1) % BLOCK_SIZE] if start else 0
        for position, token in enumerate(row.token_ids, start=start):
            before = _kept(token, before)
            self._cache[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = before
        return before

    def _draw(self, row: SequenceChunk, before: int) -> int:
        seed, choice, prompt_len = self._joins[row.slot]
        return self.sample(before, seed, choice, row.start + len(row.token_ids) - prompt_len)

    def sample(self, kept: int, seed: int, choice: int, position: int) -> int:
        """Sample a token."""
        return draw(kept, seed, choice, position)
