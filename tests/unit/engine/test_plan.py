from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import Mask, NewSequence, PromptLogprobs, Sampled, SequenceChunk, StepPlan
from engine.plan_codec import decode_plan, decode_sampled, encode_plan, encode_sampled
from engine.request import Grammar, PositionLogprobs, Request, SamplingParams, TokenLogprob
from engine.scheduling.plan_draft import new_sequence

ids = st.integers(0, 2**32 - 1)
id_lists = st.lists(ids, max_size=6).map(tuple)
numbers = st.floats(allow_nan=False)
sampling = st.builds(
    SamplingParams,
    numbers,
    st.integers(0, 2**31 - 1),
    numbers,
    numbers,
    st.integers(0, 2**64 - 1),
    numbers,
    numbers,
    numbers,
    st.lists(st.tuples(ids, numbers), max_size=3).map(tuple),
    ids,
    st.lists(id_lists, max_size=3).map(tuple),
)
alternatives = st.none() | st.integers(0, 20)
new_sequences = st.builds(
    NewSequence, ids, ids, ids, sampling, alternatives, alternatives, id_lists, id_lists, id_lists
)
chunks = st.builds(SequenceChunk, ids, ids, id_lists, id_lists, st.booleans())
plans = st.builds(
    StepPlan,
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**63 - 1),
    id_lists,
    st.lists(new_sequences, max_size=3).map(tuple),
    st.lists(chunks, max_size=4).map(tuple),
    st.lists(st.builds(Mask, ids, st.binary(max_size=9)), max_size=3).map(tuple),
    st.lists(st.tuples(ids, ids), max_size=3).map(tuple),
    st.booleans(),
)
tokens = st.builds(TokenLogprob, ids, numbers)
positions = st.builds(PositionLogprobs, tokens, st.lists(tokens, max_size=3).map(tuple))
logprobs = st.none() | positions
prompts = st.builds(PromptLogprobs, ids, st.lists(positions, max_size=3).map(tuple))


@given(plans)
def test_a_plan_survives_its_bytes(plan: StepPlan) -> None:
    assert decode_plan(encode_plan(plan)) == plan


@given(
    st.integers(0, 2**63 - 1), st.lists(st.tuples(ids, logprobs), max_size=4), st.lists(prompts, max_size=2)
)
def test_sampled_tokens_survive_their_bytes(
    step: int, sampled_tokens: list[tuple[int, PositionLogprobs | None]], prompts: list[PromptLogprobs]
) -> None:
    tokens, entries = tuple(token for token, _ in sampled_tokens), tuple(entry for _, entry in sampled_tokens)
    sampled = Sampled(step, tokens, entries, tuple(prompts))
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


@pytest.mark.parametrize(
    ("sampling", "prompt_ids", "output_ids", "ends"),
    [
        (SamplingParams(), (), (), ()),
        (SamplingParams(repetition_penalty=1.1), (5, 6), (7,), ()),
        (SamplingParams(presence_penalty=1.0), (), (7,), ()),
        (SamplingParams(frequency_penalty=1.0), (), (7,), ()),
        (SamplingParams(bad_words=((1, 2),)), (), (7,), ()),
        (SamplingParams(min_tokens=3), (), (), (2, 9)),
        (SamplingParams(logit_bias=((1, 2.0),)), (), (), ()),
    ],
)
def test_a_new_sequence_brings_the_ids_that_sampling_depends_on_and_no_others(
    sampling: SamplingParams, prompt_ids: tuple[int, ...], output_ids: tuple[int, ...], ends: tuple[int, ...]
) -> None:
    new = new_sequence(
        Request("r", (5, 6), sampling, stop_token_ids=(9,)), 0, [7], slot=3, eos_token_ids=(2,)
    )
    assert (new.prompt_ids, new.output_ids, new.ends) == (prompt_ids, output_ids, ends)


def test_end_of_sequence_that_is_ignored_may_be_sampled_at_once() -> None:
    request = Request("r", (5,), SamplingParams(min_tokens=3), stop_token_ids=(9,), ignore_eos=True)
    assert new_sequence(request, 0, [], slot=3, eos_token_ids=(2,)).ends == (9,)


def test_the_grammar_stays_with_rank_0() -> None:
    request = Request("r", (5,), SamplingParams(top_k=3, grammar=Grammar("regex", "a")))
    assert new_sequence(request, 0, [], slot=3, eos_token_ids=()).sampling == SamplingParams(top_k=3)


def test_only_a_first_choice_without_output_gets_the_prompts_log_probabilities() -> None:
    request = Request("r", (5, 6), n=2, prompt_logprobs=1)
    first, second = (new_sequence(request, choice, [], slot=3, eos_token_ids=()) for choice in (0, 1))
    assert (first.prompt_logprobs, first.prompt_ids) == (1, (5, 6))
    assert (second.prompt_logprobs, second.prompt_ids) == (None, ())
    replayed = Request("r", (5, 6), prompt_logprobs=1, prior=((8,),))
    assert new_sequence(replayed, 0, [8], slot=3, eos_token_ids=()).prompt_logprobs is None
    preempted = new_sequence(Request("r", (5, 6), prompt_logprobs=1), 0, [8], slot=3, eos_token_ids=())
    assert preempted.prompt_logprobs is None
