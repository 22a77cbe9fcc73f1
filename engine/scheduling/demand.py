"""How much there is to compute: the running sequences by kind, and the sums that the budget depends on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Demand:
    """What there is to compute now.

    A decode is a running sequence with one token to compute. A prompt is a sequence with more than one:
    running or waiting, new, replayed or preempted.

    Attributes:
        num_decodes: decodes, in flight or not.
        num_prompts: prompts, in flight or not.
        num_prompt_tokens: uncomputed tokens of prompts: of all running ones, and of as many waiting ones as
            fill the next plans.
        num_ready_tokens: the part of num_prompt_tokens that the next plan may compute.
        num_tokens_in_flight: prompt tokens in the plans in flight.
        num_resumed: prompts that have output already, because they were replayed or preempted.
    """

    num_decodes: int
    num_prompts: int
    num_prompt_tokens: int
    num_ready_tokens: int
    num_tokens_in_flight: int = 0
    num_resumed: int = 0


@dataclass(frozen=True, slots=True)
class RunningWork:
    """The running sequences by kind, each list in priority order.

    Attributes:
        ready_decodes: decodes that the next plan may compute.
        num_decodes: all decodes, in flight or not.
        prompts: all prompts, in flight or not.
        ready_prompts: prompts that the next plan may compute.
    """

    ready_decodes: list[Sequence]
    num_decodes: int
    prompts: list[Sequence]
    ready_prompts: list[Sequence]


def classify_running(running: Iterable[Sequence], *, is_async: bool) -> RunningWork:
    """Divide the running sequences into decodes and prompts.

    A sequence in flight is not ready, because its next token is not known. For an async plan every sequence
    is ready: the plan continues from the state that the sequence has after the plan in flight.
    """
    ready_decodes: list[Sequence] = []
    prompts: list[Sequence] = []
    num_decodes = 0
    for sequence in running:
        num_tokens = sequence.num_unplanned_tokens if is_async else sequence.num_uncomputed_tokens
        if num_tokens > 1:
            prompts.append(sequence)
        elif num_tokens:
            num_decodes += 1
            if is_async or not sequence.num_tokens_in_flight:
                ready_decodes.append(sequence)
    ready_prompts = prompts if is_async else [s for s in prompts if not s.num_tokens_in_flight]
    return RunningWork(ready_decodes, num_decodes, prompts, ready_prompts)


def measure_demand(
    work: RunningWork, next_waiting: Iterable[Sequence], num_waiting: int, max_tokens: int, *, is_async: bool
) -> Demand:
    """Add up the demand.

    Args:
        work: the running sequences.
        next_waiting: the waiting sequences that could get a slot, in priority order.
        num_waiting: all waiting sequences.
        max_tokens: tokens of all plans that can be in flight; waiting sequences beyond them are not counted.
        is_async: as in `classify_running`.
    """
    num_prompt_tokens = num_ready_tokens = num_tokens_in_flight = num_resumed = 0
    for sequence in work.prompts:
        num_tokens = sequence.num_unplanned_tokens if is_async else sequence.num_uncomputed_tokens
        num_prompt_tokens += num_tokens
        num_resumed += bool(sequence.output_ids)
        if is_async or not sequence.num_tokens_in_flight:
            num_ready_tokens += num_tokens
        else:
            num_tokens_in_flight += sequence.num_tokens_in_flight
    for sequence in next_waiting:
        if num_ready_tokens >= max_tokens:
            break
        num_prompt_tokens += sequence.num_tokens
        num_resumed += bool(sequence.output_ids)
        num_ready_tokens += sequence.num_tokens
    num_prompts = len(work.prompts) + num_waiting
    return Demand(
        work.num_decodes,
        num_prompts,
        num_prompt_tokens,
        num_ready_tokens,
        num_tokens_in_flight,
        num_resumed,
    )
