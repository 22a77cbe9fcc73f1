"""One step: the plan, which rank 0 decides and every rank executes, and the tokens that the step sampled.

A plan contains only changes: ranks keep the state of each slot from earlier plans. They apply a plan in this
order: freed slots, new sequences, copies, chunks. So a plan can use a slot or a block again that it frees.
`plan_codec.py` encodes plans and samples as bytes.
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
    token that it samples. No token of `ends` may be sampled before the output has `sampling.min_tokens`
    tokens. A grammar is not sent: rank 0 keeps it and sends masks.
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
    after tokens whose KV is already in its blocks. For a block that is out of the attention window, the table
    may have a 0 in its place; no query may read that entry.
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

    With `sample_on_device`, every rank samples, and stores the token ids on its device. Then the next plan
    may come before the host has read them, and has `PENDING_TOKEN` in their place.
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

    Entry i is for the prompt token after token i of the plan's chunk number `chunk`.
    """

    chunk: int
    positions: tuple[PositionLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens that a step sampled, in the order of the plan's chunks with `sample`."""

    step: int
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs | None, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
