"""Block tables: which KV blocks a sequence begins with, takes, names and lets go.

Owns: the pool, the contents of every sequence's table.
Does not own: who runs, or whose turn it is.

A full block never changes again, so sequences with the same beginning share it: those that find it by its
name, and the choices of one request. The block that a choice goes on in is its own: where it begins in the
middle of one that is computed, it gets a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from engine.scheduling.blocks import BlockPool, blocks_for
from engine.scheduling.prefix_hash import extend_chain
from engine.scheduling.sequence import Sequence
from engine.scheduling.validation import Limits


@dataclass(frozen=True, slots=True)
class Start:
    """What is computed of a sequence before it runs: `computed` tokens.

    Their KV is in `shared` blocks, the first of which is entry number `passed` of its table, and, where they
    end within a block, in `source`, of which it must get a copy.
    """

    computed: int = 0
    passed: int = 0
    shared: tuple[int, ...] = ()
    source: int | None = None


class BlockTables:
    """The tables of all sequences that run."""

    def __init__(self, limits: Limits) -> None:
        self._block_size = limits.block_size
        self._window = limits.window
        self._named = limits.prefix_cache
        self._most = limits.blocks_per_sequence
        self._pool = BlockPool(limits.kv_blocks)
        self._pinned: list[int] = []

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return self._pool.available

    @property
    def size(self) -> int:
        """Blocks in all."""
        return self._pool.size

    def can_lend(self, sibling: Sequence, sequence: Sequence) -> bool:
        """Whether a running choice still has the KV of the whole prompt that another one needs."""
        start = self._common(sequence)
        return sibling.computed >= sequence.prompt_len and sibling.passed <= self._first_needed(start)

    def start_of(self, sequence: Sequence, sibling: Sequence | None) -> Start:
        """The longest beginning of a waiting sequence that is computed, of a sibling that lends it or cached.

        The last token is always computed anew, for its logits.
        """
        if sequence.scores_prompt:
            return Start()
        if sibling is not None and not sequence.digests:
            sequence.digests = sibling.digests[: sequence.prompt_len // self._block_size]
        lent = 0 if sibling is None else self._common(sequence)
        cached = self._longest_cached(sequence, lent)
        if sibling is None or cached is not None:
            return cached or Start()
        first, block = self._first_needed(lent), lent // self._block_size
        source = sibling.blocks[block] if lent % self._block_size else None
        return Start(lent, first, tuple(sibling.blocks[first:block]), source)

    def cost(self, sequence: Sequence, start: Start) -> int:
        """By how many blocks fewer are available once all known tokens of a sequence are computed."""
        entries, held = start.passed + len(start.shared), len(start.shared)
        revived = sum(not self._pool.holders(block) for block in start.shared)
        return self._lacking(sequence.length, entries, held) + revived

    def lacking(self, sequence: Sequence) -> int:
        """Blocks that a running sequence still takes until all its known tokens are computed."""
        entries = len(sequence.blocks)
        return self._lacking(sequence.length, entries, entries - sequence.passed)

    def lacking_until(self, sequence: Sequence, end: int) -> int:
        """Blocks that a running sequence takes to compute its tokens up to `end`; not above 0 for none."""
        return -(-end // self._block_size) - len(sequence.blocks)

    def gain(self, sequences: Iterable[Sequence], keep: Collection[int] = ()) -> int:
        """Blocks that nobody would hold if all of these were dropped, without those to `keep`."""
        held = Counter(block for sequence in sequences for block in sequence.held)
        return sum(count == self._pool.holders(block) and block not in keep for block, count in held.items())

    def open(self, sequence: Sequence, start: Start) -> tuple[int, int] | None:
        """Give a sequence its start; the copy that ranks must make, from and to.

        The source stays as it is until `unpin`, so that it is no target in the same plan.
        """
        for block in start.shared:
            self._pool.share(block)
        sequence.computed, sequence.passed = start.computed, start.passed
        sequence.blocks = [0] * start.passed + list(start.shared)
        if start.source is None:
            return None
        self._pool.share(start.source)
        self._pinned.append(start.source)
        (target,) = self._pool.take(1)
        sequence.blocks.append(target)
        return start.source, target

    def unpin(self) -> None:
        """Let go of the sources of copies: the plan that makes them is complete."""
        if self._pinned:
            self._pool.release(self._pinned)
            self._pinned.clear()

    def grow(self, sequence: Sequence, end: int) -> tuple[int, ...]:
        """Blocks for the tokens up to `end`; returns the entries of the table that ranks do not know."""
        count = self.lacking_until(sequence, end)
        if count > 0:
            sequence.blocks += self._pool.take(count)
        told, entries = sequence.told, len(sequence.blocks)
        if told == entries:
            return ()
        sequence.told = entries
        return tuple(sequence.blocks[told:])

    def advance(self, sequence: Sequence, count: int) -> None:
        """The KV of a running sequence's next `count` tokens is there."""
        start = sequence.computed
        sequence.computed = end = start + count
        if self._named and end // self._block_size > start // self._block_size:
            digests = self._digests(sequence, end // self._block_size)
            for index in range(start // self._block_size, len(digests)):
                self._pool.name(sequence.blocks[index], digests[index])
        if self._window is not None:
            first = self._first_needed(end)
            if first > sequence.passed:
                self._pool.release(sequence.blocks[sequence.passed : first])
                sequence.passed = first

    def drop(self, sequence: Sequence) -> None:
        """Take back everything. What has a name can still be found for a while."""
        self._pool.release(sequence.held)
        sequence.blocks = []
        sequence.passed = sequence.told = sequence.computed = 0

    def check_integrity(self, running: Collection[Sequence]) -> None:
        """See that tables and pool agree. Raises AssertionError."""
        assert not self._pinned
        self._pool.check_integrity([sequence.held for sequence in running])
        for sequence in running:
            full = sequence.computed // self._block_size
            assert sequence.passed == self._first_needed(sequence.computed)
            assert sequence.told == len(sequence.blocks) >= blocks_for(sequence.computed, self._block_size)
            assert len(sequence.held) <= self._most
            digests = self._digests(sequence, full) if self._named else []
            for index in range(sequence.passed, len(sequence.blocks)):
                block = sequence.blocks[index]
                if index >= full:
                    assert self._pool.holders(block) == 1, "a block that is being written is shared"
                    assert self._pool.digest(block) is None, "a block that is not full has a name"
                elif self._named:
                    assert self._pool.digest(block) in (None, digests[index]), "a block has a false name"

    def _common(self, sequence: Sequence) -> int:
        """Tokens of the prompt that every choice of a request computes alike."""
        return min(sequence.prompt_len, sequence.length - 1)

    def _first_needed(self, position: int) -> int:
        """The first entry of a table that a query at `position`, or after it, looks at."""
        return 0 if self._window is None else max(0, position - self._window + 1) // self._block_size

    def _lacking(self, tokens: int, entries: int, held: int) -> int:
        return max(0, min(blocks_for(tokens, self._block_size) - entries, self._most - held))

    def _longest_cached(self, sequence: Sequence, more_than: int) -> Start | None:
        """The longest beginning of more than that many tokens whose blocks, where needed, can be found."""
        most = (sequence.length - 1) // self._block_size
        if not self._named or most * self._block_size <= more_than:
            return None
        blocks: list[int] = []
        found = run = 0  # blocks of the answer; blocks found without a gap, up to the present one
        for index, digest in enumerate(self._digests(sequence, most)):
            block = self._pool.find(digest)
            if block is None and self._window is None:
                break
            run = 0 if block is None else run + 1
            blocks.append(0 if block is None else block)
            if index + 1 - run <= self._first_needed((index + 1) * self._block_size):
                found = index + 1
        computed = found * self._block_size
        if computed <= more_than:
            return None
        first = self._first_needed(computed)
        return Start(computed, first, tuple(blocks[first:found]))

    def _digests(self, sequence: Sequence, count: int) -> list[bytes]:
        """The names of a sequence's first `count` blocks."""
        known = len(sequence.digests)
        if count > known:
            tokens = sequence.tokens(known * self._block_size, count * self._block_size)
            extend_chain(sequence.digests, tokens, self._block_size)
        return sequence.digests[:count]
