"""The longest prefix of a sequence whose KV is cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.scheduling.sliding_window import first_block_in_window


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The first `num_cached_tokens` tokens of a sequence, and the blocks that have their KV.

    `blocks` are the entries of its block table from index `num_blocks_out_of_window` on. If the match ends
    inside a block, the sequence continues in a copy of the block `copy_source`.
    """

    num_cached_tokens: int = 0
    num_blocks_out_of_window: int = 0
    blocks: tuple[int, ...] = ()
    copy_source: int | None = None


NO_MATCH = PrefixMatch()


def longest_cached_prefix(
    block_hashes: Iterable[bytes],
    find: Callable[[bytes], int | None],
    window: int | None,
    block_size: int,
) -> PrefixMatch:
    """The longest prefix, in whole blocks, whose blocks inside the window are all cached.

    Args:
        block_hashes: of the sequence's first full blocks, without the one that contains its last token.
        find: returns the cached block with a hash.
        window: as in `Limits`. Blocks before the window may be missing: no query reads them.
        block_size: tokens per block.
    """
    blocks: list[int] = []
    num_matched = 0
    num_consecutive = 0  # cached blocks without a gap, up to and including the current one
    for end, block_hash in enumerate(block_hashes, start=1):
        block = find(block_hash)
        if block is None and window is None:
            break
        blocks.append(0 if block is None else block)
        num_consecutive = 0 if block is None else num_consecutive + 1
        if end - num_consecutive <= first_block_in_window(end * block_size, window, block_size):
            num_matched = end
    num_tokens = num_matched * block_size
    first = first_block_in_window(num_tokens, window, block_size)
    return PrefixMatch(num_tokens, first, tuple(blocks[first:num_matched]))
