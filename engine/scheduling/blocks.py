"""The pool of fixed-size KV blocks: reference counts, and the prefix cache of full blocks.

Owns: the reference count of each block, the free blocks, the hash of each cached block.
Does not own: block tables (`block_tables`), how a hash is computed (`prefix_hash`), the memory of blocks.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks 0 to `size - 1`. Each one is referenced by block tables, evictable, or free.

    A block with a hash is cached: `find` returns it. When its last reference is released, a cached block
    becomes evictable and any other block becomes free. `allocate` takes free blocks before it evicts one. Of
    the free blocks it takes the one freed last, so that the engine touches few pages of memory. It evicts the
    least recently used block.

    `release` starts at the end of a table. So the end of a chain of blocks is evicted before its beginning,
    and the beginning can still be found.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._ref_counts = [0] * size
        self._free = list(range(size - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._hashes: list[bytes | None] = [None] * size
        self._cached: dict[bytes, int] = {}  # block by hash

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now, free or evictable."""
        return len(self._free) + len(self._evictable)

    def ref_count(self, block: int) -> int:
        """How many tables reference a block."""
        return self._ref_counts[block]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; their content is undefined.

        Raises:
            ValueError: fewer than `count` are available.
        """
        if count > self.num_available:
            raise ValueError(f"{count} blocks wanted, {self.num_available} available")
        return [self._allocate() for _ in range(count)]

    def share(self, block: int) -> None:
        """Add a reference to a block that is referenced or evictable.

        Raises:
            ValueError: the block is free.
        """
        if not self._ref_counts[block]:
            if self._hashes[block] is None:
                raise ValueError(f"block {block} is free: there is nothing in it to share")
            del self._evictable[block]
        self._ref_counts[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block. The blocks are of one table, in the table's order.

        Raises:
            ValueError: a block has no reference.
        """
        for block in reversed(blocks):
            if not self._ref_counts[block]:
                raise ValueError(f"block {block} has no reference")
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._evictable[block] = None

    def cache(self, block: int, block_hash: bytes) -> None:
        """Cache a full block under its hash. If another block is cached under that hash, nothing changes.

        Raises:
            ValueError: the block has a hash, or no reference.
        """
        if self._hashes[block] is not None or not self._ref_counts[block]:
            raise ValueError(f"block {block} has a hash or no reference")
        if block_hash not in self._cached:
            self._hashes[block] = block_hash
            self._cached[block_hash] = block

    def find(self, block_hash: bytes) -> int | None:
        """The block that is cached under a hash, or None."""
        return self._cached.get(block_hash)

    def block_hash(self, block: int) -> bytes | None:
        """The hash of a block; None if it is not cached."""
        return self._hashes[block]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Check that reference counts equal the references in `tables`, and that no block is lost.

        Raises:
            AssertionError: they differ.
        """
        references = Counter(block for table in tables for block in table)
        counts = Counter({block: count for block, count in enumerate(self._ref_counts) if count})
        assert references == counts, "tables and reference counts differ"
        unreferenced = {block for block in range(self.size) if not self._ref_counts[block]}
        assert set(self._evictable) == {b for b in unreferenced if self._hashes[b] is not None}
        assert sorted([*self._free, *self._evictable]) == sorted(unreferenced), "a block has leaked"
        assert self._cached == {h: block for block, h in enumerate(self._hashes) if h is not None}

    def _allocate(self) -> int:
        block = self._free.pop() if self._free else self._evict()
        self._ref_counts[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        block_hash, self._hashes[block] = self._hashes[block], None
        assert block_hash is not None
        del self._cached[block_hash]
        return block


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many blocks `num_tokens` tokens take."""
    return -(-num_tokens // block_size)
