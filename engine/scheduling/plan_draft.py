"""A step plan while the scheduler makes it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from engine.errors import EngineError
from engine.plan import Mask, NewSequence, SequenceChunk, StepPlan
from engine.request import Request
from engine.scheduling.sequence import Sequence


@dataclass(slots=True)
class PlanDraft:
    """The parts of one plan. A chunk counts as in flight as soon as it is added.

    `is_async`: whether the plan is made before the results of the plan in flight are known.
    """

    epoch: int
    step: int
    is_async: bool
    new_sequences: list[NewSequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[SequenceChunk] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)  # the sequence of each chunk

    def add_new_sequence(self, sequence: Sequence, eos_token_ids: Collection[int]) -> None:
        """Add a sequence that takes a slot."""
        request, slot = sequence.request, slot_of(sequence)
        self.new_sequences.append(
            new_sequence(request, sequence.choice, sequence.output_ids, slot, eos_token_ids)
        )

    def add_chunk(self, sequence: Sequence, num_tokens: int, blocks: tuple[int, ...]) -> None:
        """Add the next `num_tokens` tokens of a running sequence, and `blocks`, the new ones of its table."""
        start = sequence.num_planned_tokens
        end = start + num_tokens
        slot = slot_of(sequence)
        sample = end == sequence.num_tokens + sequence.num_pending_tokens
        self.chunks.append(SequenceChunk(slot, start, sequence.token_ids(start, end), blocks, sample))
        self.sequences.append(sequence)
        if sample and sequence.matcher is not None:
            self.masks.append(Mask(slot, sequence.matcher.mask()))
        sequence.num_tokens_in_flight += num_tokens
        sequence.num_pending_tokens += sample
        sequence.last_planned_step = self.step

    def build(self, freed_slots: Iterable[int], *, async_scheduling: bool) -> StepPlan:
        """The finished plan."""
        return StepPlan(
            self.epoch,
            self.step,
            tuple(freed_slots),
            tuple(self.new_sequences),
            tuple(self.chunks),
            tuple(self.masks),
            tuple(self.copies),
            async_scheduling and all(sequence.can_sample_on_device for sequence in self.sequences),
        )


def slot_of(sequence: Sequence) -> int:
    """The slot of a running sequence."""
    if sequence.slot is None:
        raise EngineError("INTERNAL", "a sequence that does not run has no slot")
    return sequence.slot


def new_sequence(
    request: Request, choice: int, output_ids: Iterable[int], slot: int, eos_token_ids: Iterable[int]
) -> NewSequence:
    """The description for the ranks of a choice that takes a slot and already has `output_ids`.

    Token ids are sent only where sampling depends on them. The log-probabilities of a prompt come with the
    first token of choice 0. So while choice 0 has no output, it computes its whole prompt, even if a part of
    the prompt is cached.
    """
    sampling = request.sampling
    output_ids = tuple(output_ids)
    prompt_logprobs = request.prompt_logprobs if choice == 0 and not output_ids else None
    needs_prompt = sampling.repetition_penalty != 1 or prompt_logprobs is not None
    needs_output = bool(
        sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.bad_words
    )
    ends = set(request.stop_token_ids) | (set() if request.ignore_eos else set(eos_token_ids))
    return NewSequence(
        slot,
        len(request.prompt_ids),
        choice,
        replace(sampling, grammar=None) if sampling.grammar else sampling,
        request.logprobs,
        prompt_logprobs,
        request.prompt_ids if needs_prompt else (),
        output_ids if needs_output else (),
        tuple(sorted(ends)) if sampling.min_tokens else (),
    )
