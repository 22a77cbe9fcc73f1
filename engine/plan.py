"""One step: the plan that the leader decides and every rank executes, and what the step sampled.

A plan is a difference. Ranks keep, per slot, what earlier plans said about its sequence. They apply a plan in
this order: freed slots, new sequences, copies, chunks. So a slot or block that a plan frees can be used again
in the same plan. `engine.plan_codec` encodes plans and samples as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.request import PositionLogprobs, SamplingParams

PENDING_TOKEN = (1 << 31) - 1
"""Placeholder for the token that the previous step samples for the same slot; the device fills it in."""


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that takes a slot: how its tokens are sampled, and where its output begins.

    `prompt_ids` and `output_ids` are the tokens known so far. They are empty unless sampling depends on them
    (penalties, bad words) or the log-probabilities of the prompt are wanted. The sampling rank adds each
    token that it samples. Before `sampling.min_tokens` output tokens, no token of `ends` may be sampled. The
    grammar stays on the leader, which sends masks.
    """

    slot: int
    prompt_len: int
    choice: int
    sampling: SamplingParams
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


class SequenceChunk(NamedTuple):
    """Consecutive tokens of one sequence. A tuple, because each step makes and reads one per sequence.

    `start` is the position of the first token. `blocks` are appended to the sequence's block table. With
    `sample`, the step samples the token after the last one of the chunk. The first chunk of a slot may start
    after tokens whose KV is in its blocks already. Block 0 may stand for a block out of the attention
    window: it keeps the place in the table, and no query may read it.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    sample: bool = False


@dataclass(frozen=True, slots=True)
class Mask:
    """The tokens that a grammar allows next: bit i of the little-endian `bits` stands for token id i."""

    slot: int
    bits: bytes


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything that one step does. The steps of an epoch are numbered from 1 without gaps.

    With `sample_on_device`, every rank samples and keeps the token ids on its device. Then the next plan may
    come before the host has read them, with `PENDING_TOKEN` in their place.
    """

    epoch: int
    step: int
    freed_slots: tuple[int, ...] = ()
    new_sequences: tuple[NewSequence, ...] = ()
    chunks: tuple[SequenceChunk, ...] = ()
    masks: tuple[Mask, ...] = ()  # for the chunks that sample under a grammar
    copies: tuple[tuple[int, int], ...] = ()  # whole KV blocks: (source, target); no target is a source
    sample_on_device: bool = False

    @property
    def tokens(self) -> int:
        """Tokens in all chunks."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of prompt tokens, each given the tokens before it.

    They belong to the tokens that follow those of chunk number `row` of the plan, up to the prompt's end.
    """

    row: int
    positions: tuple[PositionLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens that a step sampled, in the order of the plan's chunks with `sample`."""

    step: int
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs | None, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
