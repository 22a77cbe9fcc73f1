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


def _hash(token: int, prefix_hash: int) -> int:
    return zlib.crc32(array("I", (token, prefix_hash)).tobytes())


def token_at(prefix_hash: int, seed: int, choice: int, position: int) -> int:
    """The token at an output position; `prefix_hash` is the hash of all tokens before it: the model's KV."""
    return zlib.crc32(array("Q", (prefix_hash, seed, choice, position)).tobytes()) % VOCABULARY


def expected(
    prompt: Sequence[int], seed: int, choice: int, max_tokens: int, stop: bool
) -> tuple[list[int], str, str]:
    """The tokens, text and finish reason of an undisturbed run. With `stop`, STOP_PIECE ends it."""
    prefix_hash = 0
    for token in prompt:
        prefix_hash = _hash(token, prefix_hash)
    output: list[int] = []
    while True:
        token = token_at(prefix_hash, seed, choice, len(output))
        output.append(token)
        text = "".join(f"<{token}>" for token in output)
        if stop and f"<{token}>" == STOP_PIECE:
            return output, text.removesuffix(STOP_PIECE), "stop"
        if token == EOS:
            return output, text, "stop"
        if len(output) == max_tokens:
            return output, text, "length"
        prefix_hash = _hash(token, prefix_hash)


class Rank:
    """Executes plans as the sampling rank does. Its KV cache has one hash for each position of a block."""

    def __init__(self) -> None:
        self._cache: dict[tuple[int, int], int] = {}
        self._tables: dict[int, list[int]] = {}
        self._sequences: dict[int, tuple[int, int, int]] = {}  # by slot: seed, choice, length of the prompt
        self.step = 0

    def run(self, plan: StepPlan) -> Sampled:
        """Execute a plan."""
        assert plan.step == self.step + 1
        self.step = plan.step
        for slot in plan.freed_slots:
            del self._tables[slot]
        for sequence in plan.new_sequences:
            self._tables[sequence.slot] = []
            self._sequences[sequence.slot] = (
                sequence.sampling.seed, sequence.choice, sequence.prompt_len,
            )  # fmt: skip
        for source, target in plan.copies:
            for offset in range(BLOCK_SIZE):
                self._cache[target, offset] = self._cache.get((source, offset), -1)
        hashes = [self._compute(chunk) for chunk in plan.chunks]
        sampled = [
            self._sample(chunk, prefix_hash)
            for chunk, prefix_hash in zip(plan.chunks, hashes, strict=True)
            if chunk.sample
        ]
        return Sampled(plan.step, tuple(sampled), (None,) * len(sampled))

    def _compute(self, chunk: SequenceChunk) -> int:
        """Add a chunk to the cache; returns the hash of its sequence so far."""
        table = self._tables[chunk.slot]
        table.extend(chunk.blocks)
        last = chunk.start - 1
        prefix_hash = self._cache[table[last // BLOCK_SIZE], last % BLOCK_SIZE] if chunk.start else 0
        for position, token in enumerate(chunk.token_ids, start=chunk.start):
            prefix_hash = _hash(token, prefix_hash)
            self._cache[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = prefix_hash
        return prefix_hash

    def _sample(self, chunk: SequenceChunk, prefix_hash: int) -> int:
        seed, choice, prompt_len = self._sequences[chunk.slot]
        return self.sample(prefix_hash, seed, choice, chunk.start + len(chunk.token_ids) - prompt_len)

    def sample(self, prefix_hash: int, seed: int, choice: int, position: int) -> int:
        """Sample a token."""
        return token_at(prefix_hash, seed, choice, position)
