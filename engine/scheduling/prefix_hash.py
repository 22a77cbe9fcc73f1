"""Names of KV blocks by what is in them.

The keys and values of a token depend on it and on every token before, and today on nothing else. So a full
block is named by a digest of its own tokens and of the name of the block before: equal names, equal KV. The
digest is cryptographic, since whoever found two chains of one name could read another's context.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_SIZE = 32
_ROOT = bytes(_SIZE)  # what the first block follows


def extend_chain(digests: list[bytes], tokens: Sequence[int], block_size: int) -> None:
    """Append the names of the next blocks to those of a sequence's first `len(digests)`.

    `tokens` are those that follow; of an incomplete block at their end nothing is said.
    """
    for end in range(block_size, len(tokens) + 1, block_size):
        parent = digests[-1] if digests else _ROOT
        ids = array("I", tokens[end - block_size : end]).tobytes()
        digests.append(blake2b(parent + ids, digest_size=_SIZE).digest())
