from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from engine.kernels.sample import SampleSpec, sample_tokens
from engine.plan import Mask, NewSequence, StepPlan
from engine.plan_codec import decode_plan, encode_plan
from engine.request import Request, SamplingParams
from engine.sampling.logits_processors import LogitsProcessors
from engine.sampling.sampler import Sampler
from engine.scheduling.plan_draft import new_sequence

V = 40
EOS = 7
tokens = st.integers(0, V - 1)
sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 9),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.5]),
    presence_penalty=st.sampled_from([0.0, -1.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 1.5]),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
    min_tokens=st.integers(0, 6),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple),
)
requests = st.builds(
    Request,
    st.just("r"),
    st.lists(tokens, min_size=1, max_size=6).map(tuple),
    sampling,
    stop_token_ids=st.sampled_from([(), (3,)]),
    ignore_eos=st.booleans(),
)


def logits_after(ids: list[int]) -> torch.Tensor:
    """Logits of a pretended model: float32 [V], a function of the ids alone."""
    generator = torch.Generator().manual_seed(hash(tuple(ids)) % 2**31)
    return torch.randn(V, generator=generator) * 3


def documented(request: Request, output: list[int], logits: torch.Tensor) -> torch.Tensor:
    """The logits processors as docs/api.md documents them, token by token."""
    s, out = request.sampling, logits.clone()
    for word in s.bad_words:
        if output[len(output) - len(word) + 1 :] == list(word[:-1]) and len(output) >= len(word) - 1:
            out[word[-1]] = -torch.inf
    if len(output) < s.min_tokens:
        for end in (*request.stop_token_ids, *(() if request.ignore_eos else (EOS,))):
            out[end] = -torch.inf
    for token, bias in s.logit_bias:
        out[token] += bias
    for token in set(request.prompt_ids) | set(output):
        out[token] = (
            out[token] / s.repetition_penalty if out[token] > 0 else out[token] * s.repetition_penalty
        )
    for token in set(output):
        out[token] -= s.frequency_penalty * output.count(token)
        out[token] -= s.presence_penalty
    return out


def received(request: Request, slot: int, output: list[int]) -> NewSequence:
    """The new sequence as the sampling rank receives it."""
    plan = StepPlan(1, 1, new_sequences=(new_sequence(request, 0, output, slot, (EOS,)),))
    return decode_plan(encode_plan(plan)).new_sequences[0]


def applied(
    processors: LogitsProcessors, request: Request, slot: int, output: list[int], logits: torch.Tensor
) -> torch.Tensor:
    return processors.apply(logits[None], [(slot, len(output))], ())[0]


@given(requests, st.lists(tokens, max_size=70))
@settings(max_examples=80, deadline=None)
def test_every_logits_processor_is_applied_as_documented(request: Request, output: list[int]) -> None:
    processors = LogitsProcessors()
    processors.update_slots(StepPlan(1, 1, new_sequences=(received(request, 5, []),)))
    for token in output:
        processors.append_token(5, token)
    logits = logits_after(output)
    before = logits.clone()
    torch.testing.assert_close(
        applied(processors, request, 5, output, logits), documented(request, output, logits)
    )
    assert torch.equal(logits, before), "log-probabilities are computed from the unchanged logits"


@given(requests, st.lists(tokens, max_size=40), st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_output_that_a_new_sequence_brings_counts_like_output_sampled_here(
    request: Request, output: list[int], cut: int
) -> None:
    whole, rebuilt = LogitsProcessors(), LogitsProcessors()
    whole.update_slots(StepPlan(1, 1, new_sequences=(received(request, 0, []),)))
    rebuilt.update_slots(StepPlan(1, 1, new_sequences=(received(request, 9, output[:cut]),)))
    for position, token in enumerate(output):
        whole.append_token(0, token)
        if position >= cut:
            rebuilt.append_token(9, token)
    logits = logits_after(output)
    assert torch.equal(
        applied(whole, request, 0, output, logits), applied(rebuilt, request, 9, output, logits)
    )


@given(st.lists(requests, min_size=1, max_size=4), st.lists(st.integers(0, 11), min_size=4, max_size=4))
@settings(max_examples=30, deadline=None)
def test_wherever_outputs_are_cut_their_continuation_is_the_same(
    asked: list[Request], cuts: list[int]
) -> None:
    length = 12

    def run(cuts: list[int]) -> list[list[int]]:
        """Run all requests side by side. Each loses its slot at its cut, and continues in another one."""
        sampler = Sampler(sample_tokens, torch.device("cpu"))
        outputs: list[list[int]] = [[] for _ in asked]
        slots = list(range(len(asked)))
        new_sequences = [received(request, slot, []) for request, slot in zip(asked, slots, strict=True)]
        freed_slots: list[int] = []
        for position in range(length):
            for i, request in enumerate(asked):
                if cuts[i] == position:
                    freed_slots.append(slots[i])
                    slots[i] += 10
                    new_sequences.append(received(request, slots[i], outputs[i]))
            plan = StepPlan(1, position + 1, tuple(freed_slots), tuple(new_sequences))
            new_sequences, freed_slots = [], []
            specs = [
                SampleSpec(request.sampling, 0, position, slot=slot)
                for request, slot in zip(asked, slots, strict=True)
            ]
            rows = [logits_after([*r.prompt_ids, *out]) for r, out in zip(asked, outputs, strict=True)]
            for output, token in zip(
                outputs, sampler.sample(plan, torch.stack(rows), specs)().token_ids, strict=True
            ):
                output.append(token)
        return outputs

    assert run(cuts) == run([length] * 4)


def test_the_sampler_suppresses_the_end_of_sequence_before_min_tokens() -> None:
    request = Request("r", (1, 2), SamplingParams(temperature=0, min_tokens=2))
    sampler, logits = Sampler(sample_tokens, torch.device("cpu")), torch.zeros(1, V)
    logits[0, EOS], logits[0, 9] = 5.0, 4.0
    output = []
    for position in range(3):
        new = (received(request, 0, []),) if position == 0 else ()
        specs = [SampleSpec(request.sampling, 0, position, slot=0)]
        (token,) = sampler.sample(StepPlan(1, position + 1, new_sequences=new), logits, specs)().token_ids
        output.append(token)
    assert output == [9, 9, EOS]


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    request = Request("r", (1, 2, 2), SamplingParams(repetition_penalty=penalty))
    processors, logits = LogitsProcessors(), logits_after([5])
    processors.update_slots(StepPlan(1, 1, new_sequences=(received(request, 0, [9, 1]),)))
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[1, 2, 2, 9, 1]]), logits[None].clone())
    assert torch.equal(applied(processors, request, 0, [9, 1], logits), wanted[0])


@pytest.mark.parametrize("output", [[], [4], [4, 4, 4]])
def test_minimum_length_is_that_of_transformers(output: list[int]) -> None:
    request = Request("r", (1, 2), SamplingParams(min_tokens=2))
    processors, logits = LogitsProcessors(), logits_after(output)
    processors.update_slots(StepPlan(1, 1, new_sequences=(received(request, 0, output),)))
    processor = MinNewTokensLengthLogitsProcessor(2, 2, EOS, device="cpu")
    wanted = processor(torch.tensor([[1, 2, *output]]), logits[None].clone())
    assert torch.equal(applied(processors, request, 0, output, logits), wanted[0])


def mask(slot: int, allowed: set[int]) -> Mask:
    bits = sum(1 << token for token in allowed)
    return Mask(slot, bits.to_bytes(8, "little"))


def test_a_mask_leaves_what_the_grammar_allows_in_its_own_row() -> None:
    logits = torch.stack([logits_after([1]), logits_after([2])])
    out = LogitsProcessors().apply(logits, [(4, 0), (6, 0)], [mask(6, {0, 8, 39})])
    assert torch.equal(out[0], logits[0])
    assert out[1].isfinite().nonzero().flatten().tolist() == [0, 8, 39]


def test_only_the_mask_counts_where_the_rest_bans_all_that_the_grammar_allows() -> None:
    request = Request("r", (1,), SamplingParams(bad_words=((8,),), min_tokens=3))
    processors, logits = LogitsProcessors(), logits_after([1])
    processors.update_slots(StepPlan(1, 1, new_sequences=(received(request, 0, []),)))
    assert processors.apply(logits[None], [(0, 0)], [mask(0, {8, 9})])[0].isfinite().nonzero().tolist() == [
        [9]
    ]
    assert processors.apply(logits[None], [(0, 0)], [mask(0, {8, EOS})])[0].isfinite().sum() == 2


def test_rows_without_logits_processors_pass_untouched_and_uncopied() -> None:
    processors, logits = LogitsProcessors(), torch.randn(2, V)
    processors.update_slots(
        StepPlan(
            1,
            1,
            new_sequences=(NewSequence(0, 3, 0, SamplingParams()), NewSequence(1, 3, 0, SamplingParams(0.0))),
        )
    )
    assert processors.apply(logits, [(0, 0), (1, 0)], ()) is logits


def test_a_slot_given_to_another_sequence_keeps_nothing() -> None:
    request = Request("r", (1,), SamplingParams(presence_penalty=2.0))
    processors, logits = LogitsProcessors(), torch.randn(1, V)
    processors.update_slots(StepPlan(1, 1, new_sequences=(received(request, 0, [1, 2]),)))
    processors.update_slots(StepPlan(1, 2, (0,), (NewSequence(0, 3, 0, SamplingParams()),)))
    assert processors.apply(logits, [(0, 0)], ()) is logits
