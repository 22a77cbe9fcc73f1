"""One step as the leader decides it and every rank executes it, and what the step drew.

A plan is a difference: ranks keep, per slot, what earlier plans said about its sequence. A plan is applied
in the order freed slots, new sequences, copies, chunks, so that a slot or block that it frees can be used
again in the same plan. `engine.plan_codec` turns both into bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engine.request import PositionLogprobs, SamplingParams

PENDING_TOKEN = (1 << 31) - 1
"""In place of a token: the one that the step before draws for this slot, which nobody has read yet."""


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that takes a slot: how it is sampled, and where its output begins.

    Where drawing depends on tokens before (`needs_output`, `needs_prompt`), it brings those known by now;
    the rank that samples adds what it draws. `ends` may not be drawn before `sampling.min_tokens`. The
    grammar stays with the leader, which sends masks.
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
    """Consecutive tokens of one sequence. A tuple, since every step makes and reads one for each sequence.

    `start` is the position of the first; `blocks` are appended to its block table; with `sample`
    the token after the last is drawn. The first row of a slot may start behind tokens whose keys and
    values are in its blocks already. Block 0 stands for blocks that only an attention window has passed:
    the table keeps their place, and nothing of them may be read.
    """

    slot: int
    start: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    sample: bool = False


@dataclass(frozen=True, slots=True)
class Mask:
    """Which tokens a grammar allows next: bit i of the little-endian `bits` stands for token id i."""

    slot: int
    bits: bytes


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything that one step does. Steps of an epoch are numbered from 1 without gaps.

    With `sample_on_device`, every rank samples and keeps the ids on its device: the next plan may come before
    they are read, and say `PENDING_TOKEN` for them.
    """

    epoch: int
    step: int
    freed_slots: tuple[int, ...] = ()
    new_sequences: tuple[NewSequence, ...] = ()
    chunks: tuple[SequenceChunk, ...] = ()
    masks: tuple[Mask, ...] = ()  # of rows that sample under a grammar
    copies: tuple[tuple[int, int], ...] = ()  # whole KV blocks, from and to; no target is a source
    sample_on_device: bool = False

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of prompt tokens, of each given those before it.

    They are the tokens after those of the plan's row number `row`, as far as the prompt goes.
    """

    row: int
    positions: tuple[PositionLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens drawn in a step, in the order of the plan's rows that sample."""

    step: int
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs | None, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
