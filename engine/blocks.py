"""Fixed-size KV blocks, handed out and taken back.

Owns: which blocks are free.
Does not own: the tables of who holds which block, nor the memory behind a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks 0 to `size - 1`. A block freed last is taken first, so that few pages are ever touched."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))
        self._is_free = [True] * size

    @property
    def free(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` blocks. The caller has looked at `free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._is_free[block] = False
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Take back blocks that were handed out."""
        for block in reversed(blocks):
            if self._is_free[block]:
                raise ValueError(f"block {block} is already free")
            self._is_free[block] = True
            self._free.append(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """See that every block is either free or in one of the tables. Raises AssertionError."""
        held = sorted(block for table in tables for block in table)
        taken = [block for block in range(self.size) if not self._is_free[block]]
        assert held == taken, f"blocks {held} are in tables, {taken} are taken"
        assert sorted(self._free) == [block for block in range(self.size) if self._is_free[block]]


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that `tokens` tokens fill."""
    return -(-tokens // block_size)
