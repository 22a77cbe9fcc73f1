from __future__ import annotations

import pytest

from engine.blocks import BlockPool, blocks_for


def test_the_block_freed_last_is_taken_first() -> None:
    pool = BlockPool(4)
    first = pool.take(2)
    pool.release(first)
    assert pool.take(2) == first


def test_a_free_block_cannot_be_released() -> None:
    with pytest.raises(ValueError, match="block 0 is already free"):
        BlockPool(1).release([0])


def test_more_than_the_pool_has_cannot_be_taken() -> None:
    with pytest.raises(ValueError, match="2 blocks wanted, 1 free"):
        BlockPool(1).take(2)


def test_a_leaked_block_fails_the_check() -> None:
    pool = BlockPool(1)
    pool.take(1)
    with pytest.raises(AssertionError):
        pool.check_integrity([])


def test_a_block_in_two_tables_fails_the_check() -> None:
    pool = BlockPool(1)
    blocks = pool.take(1)
    pool.check_integrity([blocks])
    with pytest.raises(AssertionError):
        pool.check_integrity([blocks, blocks])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_tokens(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 16) == blocks
