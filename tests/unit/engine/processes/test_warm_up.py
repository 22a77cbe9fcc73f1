from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.processes.warm_up import warm_up_requests
from engine.request import Request


def shapes(batches: list[list[Request]]) -> set[tuple[int, int]]:
    """The (sequences, prompt length) of each batch."""
    return {(len(batch), len(batch[0].prompt_ids)) for batch in batches}


def test_there_is_a_prompt_and_a_batch_of_every_power_of_two_and_of_the_maximum() -> None:
    batches = list(warm_up_requests(max_sequences=11, max_prompt_len=20, max_batch_tokens=32))
    prompts = {(1, length) for length in (1, 2, 4, 8, 16, 20)}
    decodes = {(size, 1) for size in (1, 2, 4, 8, 11)}
    assert shapes(batches) == prompts | decodes | {(2, 20)}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 80))
def test_no_prompt_is_in_the_prefix_cache_and_no_limit_is_exceeded(
    max_sequences: int, max_prompt_len: int, max_batch_tokens: int
) -> None:
    batches = list(warm_up_requests(max_sequences, max_prompt_len, max_batch_tokens))
    requests = [request for batch in batches for request in batch]
    assert len({request.id for request in requests}) == len(requests)
    assert max(map(len, batches)) <= max_sequences
    assert max(len(request.prompt_ids) for request in requests) <= max_prompt_len
    long = [request.prompt_ids[0] for request in requests if len(request.prompt_ids) >= 16]
    assert len(set(long)) == len(long), "blocks with the same first token would be shared"
