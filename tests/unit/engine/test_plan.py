from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import Join, Row, Sampled, StepPlan, decode_plan, decode_sampled, encode_plan, encode_sampled
from engine.request import PositionLogprobs, SamplingParams, TokenLogprob

ids = st.integers(0, 2**32 - 1)
id_lists = st.lists(ids, max_size=6).map(tuple)
numbers = st.floats(allow_nan=False)
sampling = st.builds(
    SamplingParams, numbers, st.integers(0, 2**31 - 1), numbers, numbers, st.integers(0, 2**64 - 1)
)
joins = st.builds(Join, ids, ids, ids, sampling, st.none() | st.integers(0, 20))
rows = st.builds(Row, ids, ids, id_lists, id_lists, st.booleans())
plans = st.builds(
    StepPlan,
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**63 - 1),
    id_lists,
    st.lists(joins, max_size=3).map(tuple),
    st.lists(rows, max_size=4).map(tuple),
)
tokens = st.builds(TokenLogprob, ids, numbers)
logprobs = st.none() | st.builds(PositionLogprobs, tokens, st.lists(tokens, max_size=3).map(tuple))


@given(plans)
def test_a_plan_survives_its_bytes(plan: StepPlan) -> None:
    assert decode_plan(encode_plan(plan)) == plan


@given(st.integers(0, 2**63 - 1), st.lists(st.tuples(ids, logprobs), max_size=4))
def test_drawn_tokens_survive_their_bytes(
    step: int, drawn: list[tuple[int, PositionLogprobs | None]]
) -> None:
    sampled = Sampled(step, tuple(token for token, _ in drawn), tuple(entry for _, entry in drawn))
    assert decode_sampled(encode_sampled(sampled)) == sampled


@given(plans, st.data())
def test_a_plan_cut_short_is_refused(plan: StepPlan, data: st.DataObject) -> None:
    whole = encode_plan(plan)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises((struct.error, ValueError)):
        decode_plan(whole[:cut])


def test_a_plan_with_bytes_left_over_is_refused() -> None:
    with pytest.raises(ValueError, match="after the end"):
        decode_plan(encode_plan(StepPlan(1, 1)) + b"\0")
