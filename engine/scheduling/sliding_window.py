"""Which KV blocks of a sequence its attention window still sees.

After each step `BlockTables.advance` releases the blocks that it no longer sees.
"""

from __future__ import annotations


def first_block_in_window(position: int, window: int | None, block_size: int) -> int:
    """The first entry of a block table that a query at `position`, or at any later one, reads.

    The query sees `window` keys, its own included; with None it sees all keys before it.
    """
    return 0 if window is None else max(0, position - window + 1) // block_size
