"""Fixed-size KV blocks, handed out, shared and taken back; what is left of them is kept as cache.

Owns: how many hold each block, which blocks are free, which content can be found in which block.
Does not own: the tables of who holds which block, what a digest stands for (`prefix_hash`), nor the memory
behind a block.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks 0 to `size - 1`: held by one or more, kept for their content, or free.

    A free block is taken before a kept one, the one freed last first, so that few pages are ever touched.
    Of the kept ones the one unused for the longest goes first. `release` takes a table from its end, so that
    a block's continuations always go before itself: what is left of a chain can still be found.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._holders = [0] * size
        self._free = list(range(size - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # named blocks that nobody holds, oldest first
        self._digests: list[bytes | None] = [None] * size
        self._found: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free) + len(self._kept)

    def holders(self, block: int) -> int:
        """How many hold a block."""
        return self._holders[block]

    def take(self, count: int) -> list[int]:
        """`count` blocks with nothing in them that matters. The caller has looked at `available`."""
        if count > self.available:
            raise ValueError(f"{count} blocks wanted, {self.available} available")
        return [self._take() for _ in range(count)]

    def share(self, block: int) -> None:
        """Hold a block that others hold or that is kept."""
        if not self._holders[block]:
            if self._digests[block] is None:
                raise ValueError(f"block {block} is free: there is nothing in it to share")
            del self._kept[block]
        self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of blocks of one table, given in its order."""
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"block {block} is held by nobody")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._digests[block] is None:
                self._free.append(block)
            else:
                self._kept[block] = None

    def name(self, block: int, digest: bytes) -> None:
        """Make a full block findable. Where another holds the same content, that one stays the one found."""
        if self._digests[block] is not None or not self._holders[block]:
            raise ValueError(f"block {block} has a name or no holder")
        if digest not in self._found:
            self._digests[block] = digest
            self._found[digest] = block

    def find(self, digest: bytes) -> int | None:
        """The block of that content."""
        return self._found.get(digest)

    def digest(self, block: int) -> bytes | None:
        """The name of a block."""
        return self._digests[block]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """See that every block is free, kept, or in as many tables as hold it. Raises AssertionError."""
        held = Counter(block for table in tables for block in table)
        assert held == Counter({b: n for b, n in enumerate(self._holders) if n}), "tables and holders differ"
        unheld = {block for block in range(self.size) if not self._holders[block]}
        assert set(self._kept) == {b for b in unheld if self._digests[b] is not None}
        assert sorted([*self._free, *self._kept]) == sorted(unheld), "a block has leaked"
        assert self._found == {d: block for block, d in enumerate(self._digests) if d is not None}

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            digest, self._digests[block] = self._digests[block], None
            assert digest is not None
            del self._found[digest]
        self._holders[block] = 1
        return block


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that `tokens` tokens fill."""
    return -(-tokens // block_size)
