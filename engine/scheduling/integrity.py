"""Checks that the scheduler's state is consistent. Tests run them between steps."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from engine.plan import SequenceChunk, StepPlan
from engine.scheduling.choices import Choices
from engine.scheduling.limits import Limits
from engine.scheduling.plan_draft import slot_of
from engine.scheduling.sequence import Sequence


def check_sequences(choices: Choices, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
    """Check that each live sequence runs, waits or is held back, and that its fields agree with that."""
    running, waiting = list(running), list(waiting)
    held_back = list(chain.from_iterable(choices.held_back.values()))
    sequences = list(chain.from_iterable(choices.live.values()))
    assert {id(s) for s in sequences} == {id(s) for s in [*running, *waiting, *held_back]}
    assert len(sequences) == choices.num_live == len(running) + len(waiting) + len(held_back)
    for queue in (running, waiting):
        assert queue == sorted(queue, key=lambda sequence: sequence.order)
    for sequence in sequences:
        assert sequence.num_tokens == sequence.prompt_len + len(sequence.output_ids)
        assert sequence.num_uncomputed_tokens > 0, "nothing is left to compute"
    for sequence in [*waiting, *held_back]:
        assert sequence.slot is None
        assert not sequence.blocks
        assert sequence.num_computed_tokens == 0
        assert (sequence.num_blocks_out_of_window, sequence.num_blocks_sent) == (0, 0)
        assert (sequence.num_tokens_in_flight, sequence.num_pending_tokens) == (0, 0)
    for request_id, siblings in choices.held_back.items():
        assert siblings
        assert any(
            sibling.slot is not None and sibling.num_computed_tokens < sibling.prompt_len
            for sibling in choices.live[request_id]
        ), "no choice computes the prompt that others are held back for"


def check_slots(running: Iterable[Sequence], free_slots: list[int], limits: Limits) -> None:
    """Check that every slot is free or belongs to one running sequence."""
    used = [slot_of(sequence) for sequence in running]
    assert sorted(used + free_slots) == list(range(limits.max_running))


def check_plans_in_flight(
    choices: Choices, in_flight: Iterable[tuple[StepPlan, list[Sequence]]], limits: Limits
) -> None:
    """Check each sequence's numbers of tokens in flight and pending tokens against the plans in flight."""
    chunks_of: dict[int, list[SequenceChunk]] = {}
    for plan, sequences in in_flight:
        for chunk, sequence in zip(plan.chunks, sequences, strict=True):
            if sequence.slot is not None:
                chunks_of.setdefault(id(sequence), []).append(chunk)
    max_plans = 2 if limits.async_scheduling else 1
    assert all(len(chunks) <= max_plans for chunks in chunks_of.values()), (
        "a sequence is in too many plans in flight"
    )
    live = list(chain.from_iterable(choices.live.values()))
    assert {id(s) for s in live if s.num_tokens_in_flight} == chunks_of.keys()
    for sequence in live:
        chunks = chunks_of.get(id(sequence), [])
        assert sequence.num_tokens_in_flight == sum(len(chunk.token_ids) for chunk in chunks)
        assert sequence.num_pending_tokens == sum(chunk.sample for chunk in chunks)
