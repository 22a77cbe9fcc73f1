"""Hashes of full KV blocks, by which the prefix cache finds them.

The keys and values of a token depend on that token and on all tokens before it, and on nothing else. So the
hash of a full block covers its own tokens and the hash of the block before it: equal hashes mean equal KV.
The hash is cryptographic: two prompts that collide would let one client read the context of another.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_HASH_BYTES = 32
_ROOT = bytes(_HASH_BYTES)  # stands for the block before the first


def extend_block_hashes(hashes: list[bytes], token_ids: Sequence[int], block_size: int) -> None:
    """Append the hashes of a sequence's next full blocks.

    Args:
        hashes: of the sequence's first full blocks.
        token_ids: the tokens after those blocks. An incomplete block at the end gets no hash.
        block_size: tokens per block.
    """
    for end in range(block_size, len(token_ids) + 1, block_size):
        parent = hashes[-1] if hashes else _ROOT
        ids = array("I", token_ids[end - block_size : end]).tobytes()
        hashes.append(blake2b(parent + ids, digest_size=_HASH_BYTES).digest())
