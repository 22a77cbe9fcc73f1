from __future__ import annotations

import pytest

from engine.scheduling.blocks import BlockPool, blocks_for

A, B, C = b"a", b"b", b"c"


def cached(pool: BlockPool, *hashes: bytes) -> list[int]:
    """A chain of cached blocks, each with one reference."""
    blocks = pool.allocate(len(hashes))
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.cache(block, block_hash)
    return blocks


def test_the_block_freed_last_is_allocated_first() -> None:
    pool = BlockPool(4)
    first = pool.allocate(2)
    pool.release(first)
    assert pool.allocate(2) == first


def test_a_block_without_a_reference_cannot_be_released() -> None:
    with pytest.raises(ValueError, match="block 0 has no reference"):
        BlockPool(1).release([0])


def test_more_than_the_pool_has_cannot_be_allocated() -> None:
    with pytest.raises(ValueError, match="2 blocks wanted, 1 available"):
        BlockPool(1).allocate(2)


def test_a_shared_block_is_free_once_its_last_reference_is_released() -> None:
    pool = BlockPool(1)
    (block,) = cached(pool, A)
    pool.share(block)
    pool.release([block])
    assert (pool.ref_count(block), pool.num_available) == (1, 0)
    pool.release([block])
    assert (pool.ref_count(block), pool.num_available) == (0, 1)


def test_a_cached_block_is_found_after_its_last_reference_is_released() -> None:
    pool = BlockPool(2)
    blocks = cached(pool, A)
    pool.release(blocks)
    assert pool.find(A) == blocks[0]
    pool.share(blocks[0])
    pool.check_integrity([blocks])


def test_free_blocks_are_allocated_before_evictable_ones() -> None:
    pool = BlockPool(2)
    pool.release(cached(pool, A))
    pool.allocate(1)
    assert pool.find(A) is not None


def test_the_least_recently_used_block_is_evicted_first_and_the_end_of_a_chain_before_its_beginning() -> None:
    pool = BlockPool(3)
    chain, other = cached(pool, A, B), cached(pool, C)
    pool.release(chain)
    pool.release(other)
    gone = []
    for _ in range(3):
        pool.allocate(1)
        gone.append([block_hash for block_hash in (A, B, C) if pool.find(block_hash) is None])
    assert gone == [[B], [A, B], [A, B, C]]


def test_the_first_of_two_blocks_with_the_same_hash_stays_cached() -> None:
    pool = BlockPool(2)
    (first,), (second,) = cached(pool, A), cached(pool, A)
    assert pool.find(A) == first
    pool.release([second])
    pool.release([first])
    assert pool.find(A) == first
    pool.check_integrity([])


def test_a_free_block_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="nothing in it"):
        BlockPool(1).share(0)


def test_a_leaked_block_fails_the_check() -> None:
    pool = BlockPool(1)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.check_integrity([])


def test_a_block_with_fewer_references_than_tables_fails_the_check() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.check_integrity([blocks])
    with pytest.raises(AssertionError):
        pool.check_integrity([blocks, blocks])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_tokens(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 16) == blocks
