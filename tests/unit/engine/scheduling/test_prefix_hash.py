from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.prefix_hash import extend_block_hashes

tokens = st.lists(st.integers(0, 2), max_size=12)


def hashes_of(ids: list[int], block_size: int = 2) -> list[bytes]:
    hashes: list[bytes] = []
    extend_block_hashes(hashes, ids, block_size)
    return hashes


@given(tokens, tokens)
def test_blocks_have_equal_hashes_exactly_when_everything_up_to_their_end_is_equal(
    left: list[int], right: list[int]
) -> None:
    for index, (one, other) in enumerate(zip(hashes_of(left), hashes_of(right), strict=False)):
        assert (one == other) == (left[: 2 * index + 2] == right[: 2 * index + 2])


def test_an_incomplete_block_has_no_hash() -> None:
    assert len(hashes_of([1, 2, 3])) == 1


def test_a_chain_goes_on_where_it_ended() -> None:
    hashes = hashes_of([1, 2])
    extend_block_hashes(hashes, [3, 4], 2)
    assert hashes == hashes_of([1, 2, 3, 4])


def test_tokens_are_not_confused_across_the_borders_of_their_bytes() -> None:
    assert hashes_of([1, 256]) != hashes_of([256, 1])
    assert hashes_of([0, 0]) != hashes_of([0, 0, 0, 0])[1:]
