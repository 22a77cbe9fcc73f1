"""Block tables: which KV blocks each running sequence references.

Owns: the block pool, and the fields of `Sequence` that describe its block table.
Does not own: which sequences run, and in which order (`scheduler`).

- A sequence that starts gets the cached blocks of its longest prefix (`match_prefix`, `start`).
- Each chunk allocates the blocks for its tokens (`allocate_until`).
- After each step (`advance`) full blocks get their hash, and blocks behind a sliding window are released
  (`free_blocks_out_of_window`).
- A sequence that ends or is preempted releases all its blocks (`free`).

A full block never changes. So sequences with the same beginning share it: sequences that find it by its hash,
and the choices of one request. A sequence never writes to a shared block: if it continues in the middle of a
computed block, it gets a copy of that block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from engine.scheduling.blocks import BlockPool, blocks_for
from engine.scheduling.limits import Limits
from engine.scheduling.prefix_hash import extend_block_hashes
from engine.scheduling.prefix_match import NO_MATCH, PrefixMatch, longest_cached_prefix
from engine.scheduling.sequence import Sequence
from engine.scheduling.sliding_window import first_block_in_window


class BlockTables:
    """The block tables of all running sequences."""

    def __init__(self, limits: Limits) -> None:
        self._block_size = limits.block_size
        self._window = limits.window
        self._prefix_cache = limits.prefix_cache
        self._max_blocks_per_sequence = limits.blocks_per_sequence
        self._pool = BlockPool(limits.kv_blocks)
        self._copy_sources: list[int] = []

    @property
    def num_available_blocks(self) -> int:
        """Blocks that can be allocated now, free or evictable."""
        return self._pool.num_available

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self._pool.size

    # The start of a sequence

    def can_share_prompt(self, sibling: Sequence, sequence: Sequence) -> bool:
        """Whether a running choice has all KV of the prompt that another choice of the request needs."""
        first = self._first_block_in_window(_num_shared_tokens(sequence))
        return (
            sibling.num_computed_tokens >= sequence.prompt_len and sibling.num_blocks_out_of_window <= first
        )

    def match_prefix(self, sequence: Sequence, sibling: Sequence | None) -> PrefixMatch:
        """The longest prefix of a waiting sequence whose KV is in blocks already.

        The blocks are cached ones, or belong to `sibling`, with which the sequence must be able to share the
        prompt (`can_share_prompt`). The match never includes the last token of the sequence: it is always
        computed, for its logits.
        """
        if sequence.needs_prompt_logprobs:
            return NO_MATCH
        shared = NO_MATCH
        if sibling is not None:
            shared = self._match_sibling(sequence, sibling)
            if not sequence.block_hashes:
                sequence.block_hashes = sibling.block_hashes[: sequence.prompt_len // self._block_size]
        max_blocks = (sequence.num_tokens - 1) // self._block_size
        if not self._prefix_cache or max_blocks * self._block_size <= shared.num_cached_tokens:
            return shared
        cached = self._match_cached_blocks(sequence, max_blocks)
        return cached if cached.num_cached_tokens > shared.num_cached_tokens else shared

    def start(self, sequence: Sequence, match: PrefixMatch) -> tuple[int, int] | None:
        """Begin the block table of a sequence with a prefix match.

        Returns the copy of a block that ranks must make, as (source, target), or None. The source gets an
        extra reference until `release_copy_sources`, so that the same plan does not allocate it.
        """
        for block in match.blocks:
            self._pool.share(block)
        sequence.num_computed_tokens = match.num_cached_tokens
        sequence.num_blocks_out_of_window = match.num_blocks_out_of_window
        sequence.blocks = [0] * match.num_blocks_out_of_window + list(match.blocks)
        source = match.copy_source
        if source is None:
            return None
        self._pool.share(source)
        self._copy_sources.append(source)
        (target,) = self._pool.allocate(1)
        sequence.blocks.append(target)
        return source, target

    def release_copy_sources(self) -> None:
        """Drop the extra references of copy sources. Call this when the plan with the copies is complete."""
        if self._copy_sources:
            self._pool.release(self._copy_sources)
            self._copy_sources.clear()

    # While a sequence runs

    def allocate_until(self, sequence: Sequence, end: int) -> tuple[int, ...]:
        """Allocate blocks for the tokens before position `end`; returns the entries to send to the ranks."""
        count = self.num_missing_blocks_until(sequence, end)
        if count > 0:
            sequence.blocks += self._pool.allocate(count)
        sent, entries = sequence.num_blocks_sent, len(sequence.blocks)
        if sent == entries:
            return ()
        sequence.num_blocks_sent = entries
        return tuple(sequence.blocks[sent:])

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """Update the table after a step has computed the next `num_tokens` tokens of a running sequence."""
        start = sequence.num_computed_tokens
        sequence.num_computed_tokens = end = start + num_tokens
        if self._prefix_cache and end // self._block_size > start // self._block_size:
            self._cache_full_blocks(sequence, start // self._block_size, end // self._block_size)
        if self._window is not None:
            first = first_block_in_window(end, self._window, self._block_size)
            if first > sequence.num_blocks_out_of_window:
                self.free_blocks_out_of_window(sequence, first)

    def free_blocks_out_of_window(self, sequence: Sequence, first: int) -> None:
        """Release the blocks before entry number `first` of the table; no later query reads them."""
        self._pool.release(sequence.blocks[sequence.num_blocks_out_of_window : first])
        sequence.num_blocks_out_of_window = first

    def free(self, sequence: Sequence) -> None:
        """Release all blocks of a sequence. Cached blocks can be found until they are evicted."""
        self._pool.release(sequence.referenced_blocks)
        sequence.blocks = []
        sequence.num_blocks_out_of_window = sequence.num_blocks_sent = sequence.num_computed_tokens = 0

    # What a decision would cost or free, in blocks

    def num_missing_blocks_until(self, sequence: Sequence, end: int) -> int:
        """Blocks that a running sequence must allocate for its tokens before `end`; none if 0 or less."""
        return -(-end // self._block_size) - len(sequence.blocks)

    def num_missing_blocks(self, sequence: Sequence) -> int:
        """Blocks that a running sequence must still allocate to compute all its known tokens."""
        entries = len(sequence.blocks)
        return self._num_missing(sequence.num_tokens, entries, entries - sequence.num_blocks_out_of_window)

    def num_blocks_to_start(self, sequence: Sequence, match: PrefixMatch) -> int:
        """Available blocks that a waiting sequence takes to compute all its known tokens.

        A matched block that is evictable counts too: with a reference it is no longer available.
        """
        referenced = len(match.blocks)
        missing = self._num_missing(
            sequence.num_tokens, match.num_blocks_out_of_window + referenced, referenced
        )
        return missing + sum(not self._pool.ref_count(block) for block in match.blocks)

    def num_blocks_freed_by(self, victims: Iterable[Sequence], excluding: Collection[int] = ()) -> int:
        """Blocks that lose their last reference if all `victims` are preempted, without `excluding`."""
        references = Counter(block for victim in victims for block in victim.referenced_blocks)
        return sum(
            count == self._pool.ref_count(block) and block not in excluding
            for block, count in references.items()
        )

    def check_integrity(self, running: Collection[Sequence]) -> None:
        """Check that the tables of all running sequences and the pool agree.

        Raises:
            AssertionError: they do not.
        """
        assert not self._copy_sources
        self._pool.check_integrity([sequence.referenced_blocks for sequence in running])
        for sequence in running:
            computed, entries = sequence.num_computed_tokens, len(sequence.blocks)
            assert sequence.num_blocks_out_of_window == self._first_block_in_window(computed)
            assert sequence.num_blocks_sent == entries >= blocks_for(computed, self._block_size)
            assert len(sequence.referenced_blocks) <= self._max_blocks_per_sequence
            num_full = computed // self._block_size
            hashes = self._block_hashes(sequence, num_full) if self._prefix_cache else []
            for index in range(sequence.num_blocks_out_of_window, entries):
                block = sequence.blocks[index]
                if index >= num_full:
                    assert self._pool.ref_count(block) == 1, "a block that is being written is shared"
                    assert self._pool.block_hash(block) is None, "a block that is not full has a hash"
                elif self._prefix_cache:
                    assert self._pool.block_hash(block) in (None, hashes[index]), "a block has a wrong hash"

    def _match_sibling(self, sequence: Sequence, sibling: Sequence) -> PrefixMatch:
        num_tokens = _num_shared_tokens(sequence)
        first, last = self._first_block_in_window(num_tokens), num_tokens // self._block_size
        copy_source = sibling.blocks[last] if num_tokens % self._block_size else None
        return PrefixMatch(num_tokens, first, tuple(sibling.blocks[first:last]), copy_source)

    def _match_cached_blocks(self, sequence: Sequence, max_blocks: int) -> PrefixMatch:
        hashes = self._block_hashes(sequence, max_blocks)
        return longest_cached_prefix(hashes, self._pool.find, self._window, self._block_size)

    def _cache_full_blocks(self, sequence: Sequence, start: int, end: int) -> None:
        hashes = self._block_hashes(sequence, end)
        for index in range(start, end):
            self._pool.cache(sequence.blocks[index], hashes[index])

    def _block_hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """The hashes of a sequence's first `count` blocks."""
        known = len(sequence.block_hashes)
        if count > known:
            token_ids = sequence.token_ids(known * self._block_size, count * self._block_size)
            extend_block_hashes(sequence.block_hashes, token_ids, self._block_size)
        return sequence.block_hashes[:count]

    def _first_block_in_window(self, position: int) -> int:
        return first_block_in_window(position, self._window, self._block_size)

    def _num_missing(self, num_tokens: int, entries: int, referenced: int) -> int:
        """Blocks to allocate for `num_tokens` tokens; a sliding window limits how many are used at once."""
        missing = blocks_for(num_tokens, self._block_size) - entries
        return max(0, min(missing, self._max_blocks_per_sequence - referenced))


def _num_shared_tokens(sequence: Sequence) -> int:
    """Prompt tokens that a choice can take from a sibling: all, except the last token of the sequence."""
    return min(sequence.prompt_len, sequence.num_tokens - 1)
