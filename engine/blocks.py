"""Fixed-size KV blocks, handed out and taken back.

Owns: which blocks are free, and how many holders each of the others has.
Does not own: the tables of who holds which block, nor the memory behind a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks 0 to `size - 1`. A block freed last is taken first, so that few pages are ever touched."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))
        self._holders = [0] * size

    @property
    def free(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks with one holder each. The caller has looked at `free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to blocks that have one."""
        for block in blocks:
            if not self._holders[block]:
                raise ValueError(f"block {block} is free and cannot be shared")
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a holder of each block; a block without holders is free."""
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"block {block} is already free")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """See that the holders are exactly the tables given. Raises AssertionError."""
        held = Counter(block for table in tables for block in table)
        for block, holders in enumerate(self._holders):
            assert holders == held[block], f"block {block}: {holders} holders, {held[block]} tables"
        assert sorted(self._free) == [block for block in range(self.size) if not self._holders[block]]


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that `tokens` tokens fill."""
    return -(-tokens // block_size)
