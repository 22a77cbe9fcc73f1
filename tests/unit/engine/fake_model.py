"""A model whose KV is a hash, and a rank that executes plans with it.

The KV of a token depends on the token, its position and the KV of every token before it in the window. So any
mix-up of blocks changes the tokens that are sampled.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.plan import PENDING_TOKEN, NewSequence, PromptLogprobs, Sampled, SequenceChunk, StepPlan
from engine.plan_codec import decode_plan, encode_plan
from engine.request import FinishReason, PositionLogprobs, SamplingParams, TokenLogprob

VOCABULARY = 50
EOS = 0
_EMPTY = 0xDEAD
_PLAIN = SamplingParams()


def kv_of(token: int, position: int, before: Sequence[int]) -> int:
    """The KV of a token, given the KV of the tokens before it in the window."""
    return zlib.crc32(array("I", (token, position, *before)).tobytes())


def kv_of_all(tokens: Sequence[int], window: int | None = None) -> list[int]:
    """The KV of every token of a sequence."""
    kv: list[int] = []
    for position, token in enumerate(tokens):
        kv.append(kv_of(token, position, kv[_first(position, window) :]))
    return kv


def next_token(tokens: Sequence[int], window: int | None = None) -> int:
    """The token after `tokens`; the end of sequence in about one case of 50."""
    return kv_of_all(tokens, window)[-1] % VOCABULARY


class FakeMatcher:
    """A grammar: a hash of the output decides which tokens may follow, and when the output is complete."""

    def __init__(self, output: Sequence[int]) -> None:
        self._hash = 1
        for token in output:
            self.accept(token)

    @property
    def finish(self) -> FinishReason | None:
        return "stop" if self._hash % 17 == 0 else None

    def accept(self, token_id: int) -> None:
        self._hash = zlib.crc32(bytes([token_id]), self._hash)

    def mask(self) -> bytes:
        some = self._hash * 0x9E3779B97F4A7C15 % (1 << VOCABULARY)
        return (some | 1 << self._hash % VOCABULARY).to_bytes(7, "little")


def sample(
    kv: int, sampling: SamplingParams, prompt: Sequence[int], output: Sequence[int], mask: bytes | None
) -> int:
    """The token after the one with that KV.

    Penalties add a hash of the tokens that they depend on. With a mask, it is the next token that is allowed.
    """
    if sampling.has_penalties:
        seen = (*prompt, *output) if sampling.repetition_penalty != 1 else output
        kv += zlib.crc32(array("I", seen).tobytes())
    token = kv % VOCABULARY
    if mask is not None:
        allowed = int.from_bytes(mask, "little")
        while not allowed >> token & 1:
            token = (token + 1) % VOCABULARY
    return token


def expected(
    prompt: Sequence[int],
    max_tokens: int,
    ignore_eos: bool,
    window: int | None = None,
    sampling: SamplingParams = _PLAIN,
) -> tuple[list[int], str]:
    """The output of an undisturbed run, and why it ends."""
    kv = kv_of_all(prompt, window)
    output: list[int] = []
    matcher = FakeMatcher(()) if sampling.grammar else None
    while True:
        output.append(sample(kv[-1], sampling, prompt, output, matcher.mask() if matcher else None))
        if matcher:
            matcher.accept(output[-1])
        if output[-1] == EOS and not ignore_eos:
            return output, "stop"
        if matcher and matcher.finish:
            return output, "stop"
        if len(output) == max_tokens:
            return output, "length"
        position = len(kv)
        kv.append(kv_of(output[-1], position, kv[_first(position, window) :]))


@dataclass
class _Slot:
    """A rank's state of the sequence in a slot."""

    new: NewSequence
    output: list[int]
    table: list[int] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether its next step may be planned before the host knows its token."""
        new = self.new
        asks_logprobs = new.logprobs is not None or new.prompt_logprobs is not None
        return not asks_logprobs and not new.sampling.has_logits_processors


class FakeRank:
    """Executes plans as a rank does."""

    def __init__(self, block_size: int, window: int | None = None) -> None:
        self._block_size = block_size
        self._window = window
        self._blocks: dict[int, list[int]] = {}  # KV by block
        self._slots: dict[int, _Slot] = {}
        self._on_device: dict[int, int] = {}  # by slot: what PENDING_TOKEN stands for in the next plan
        self.step = 0
        self.computed_tokens = 0

    def run(self, plan: StepPlan) -> Sampled:
        """Apply the plan; the log-probability of a sampled token is the KV of the token before it."""
        plan = decode_plan(encode_plan(plan))
        assert plan.step == self.step + 1
        self.step = plan.step
        for slot in plan.freed_slots:
            del self._slots[slot]
        for new in plan.new_sequences:
            assert new.slot not in self._slots
            self._slots[new.slot] = _Slot(new, list(new.output_ids))
        sources, targets = {source for source, _ in plan.copies}, [target for _, target in plan.copies]
        assert sources.isdisjoint(targets)
        assert len(set(targets)) == len(targets)
        for source, target in plan.copies:
            self._blocks[target] = list(self._blocks[source])
        pending, self._on_device = self._on_device, {}
        masks = {mask.slot: mask.bits for mask in plan.masks}
        tokens: list[int] = []
        logprobs: list[PositionLogprobs] = []
        prompt_logprobs = []
        for row, chunk in enumerate(plan.chunks):
            slot = self._slots[chunk.slot]
            assert slot.is_plain or not plan.sample_on_device
            if PENDING_TOKEN in chunk.token_ids:
                chunk = chunk._replace(token_ids=(*chunk.token_ids[:-1], pending[chunk.slot]))
            kv = self._compute(slot, chunk)
            if slot.new.prompt_logprobs is not None and chunk.start + 1 < slot.new.prompt_len:
                prompt_logprobs.append(
                    PromptLogprobs(row, score_prompt(slot.new.prompt_ids, kv, chunk.start))
                )
            if chunk.sample:
                token = sample(
                    kv[-1], slot.new.sampling, slot.new.prompt_ids, slot.output, masks.pop(chunk.slot, None)
                )
                slot.output.append(token)
                tokens.append(token)
                logprobs.append(PositionLogprobs(TokenLogprob(token, float(kv[-1]))))
                if plan.sample_on_device:
                    self._on_device[chunk.slot] = token
        assert not masks, "a mask for a sequence that samples nothing"
        self.computed_tokens += plan.tokens
        return Sampled(plan.step, tuple(tokens), tuple(logprobs), tuple(prompt_logprobs))

    def _compute(self, slot: _Slot, chunk: SequenceChunk) -> list[int]:
        """Write the KV of a chunk's tokens into their blocks, and return it."""
        slot.table.extend(chunk.blocks)
        first = _first(chunk.start, self._window)
        kv = [
            self._block(slot, position)[position % self._block_size] for position in range(first, chunk.start)
        ]
        for position, token in enumerate(chunk.token_ids, start=chunk.start):
            kv.append(kv_of(token, position, kv[_first(position, self._window) - first :]))
            self._block(slot, position)[position % self._block_size] = kv[-1]
        return kv[chunk.start - first :]

    def _block(self, slot: _Slot, position: int) -> list[int]:
        block = slot.table[position // self._block_size]
        return self._blocks.setdefault(block, [_EMPTY] * self._block_size)


def score_prompt(prompt: Sequence[int], kv: Sequence[int], start: int = 0) -> tuple[PositionLogprobs, ...]:
    """A rank's scores of the prompt tokens after position `start`, from the KV of the tokens before them."""
    following = prompt[start + 1 : start + 1 + len(kv)]
    return tuple(
        PositionLogprobs(TokenLogprob(token, float(before)))
        for token, before in zip(following, kv, strict=False)
    )


def _first(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)
