from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.prefix_match import longest_cached_prefix
from engine.scheduling.sliding_window import first_block_in_window


@given(st.lists(st.booleans(), max_size=8), st.none() | st.integers(1, 20), st.integers(1, 4))
def test_a_match_is_the_longest_prefix_whose_blocks_in_the_window_are_all_cached(
    cached: list[bool], window: int | None, block_size: int
) -> None:
    hashes = [bytes([index]) for index in range(len(cached))]
    blocks = {block_hash: 10 + index for index, block_hash in enumerate(hashes) if cached[index]}
    lengths = [
        length
        for length in range(len(cached) + 1)
        if all(cached[first_block_in_window(length * block_size, window, block_size) : length])
    ]
    match = longest_cached_prefix(hashes, blocks.get, window, block_size)
    first = first_block_in_window(match.num_cached_tokens, window, block_size)
    assert match.num_cached_tokens == max(lengths) * block_size
    assert match.num_blocks_out_of_window == first
    assert match.blocks == tuple(range(10 + first, 10 + max(lengths)))


@given(st.integers(0, 200), st.integers(1, 50), st.integers(1, 16))
def test_the_first_block_in_the_window_has_its_first_key(position: int, window: int, block_size: int) -> None:
    first_key = max(0, position - window + 1)
    block = first_block_in_window(position, window, block_size)
    assert block * block_size <= first_key < (block + 1) * block_size


def test_without_a_window_every_block_is_read() -> None:
    assert first_block_in_window(1000, None, 4) == 0
