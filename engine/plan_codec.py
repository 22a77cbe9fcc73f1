"""Step plans and sampled tokens as bytes: little-endian integers and floats, no pickle.

Chunks are packed column by column, which is fast: every step waits for them. Everything else is packed value
by value.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate, chain, pairwise
from typing import Any

from engine.plan import Mask, NewSequence, PromptLogprobs, Sampled, SequenceChunk, StepPlan
from engine.request import PositionLogprobs, SamplingParams, TokenLogprob

# Epoch, step; the numbers of freed slots, new sequences, chunks, masks and copies; sample_on_device.
_HEADER = struct.Struct("<qqIIIII?")
_NEW_SEQUENCE = struct.Struct("<IIIiidqddQdddI")
_LENGTHS = struct.Struct("<IIIII")  # of a new sequence's prompt, output, ends, logit_bias, bad_words
_BIAS = struct.Struct("<Id")  # token id, bias
_COUNT = struct.Struct("<I")
_MASK = struct.Struct("<II")  # slot, bytes
_COPY = struct.Struct("<II")  # source, target
_SAMPLED = struct.Struct("<qII")  # step, tokens, chunks with log-probabilities of the prompt
_LOGPROB = struct.Struct("<Id")  # token id, log-probability


def encode_plan(plan: StepPlan) -> bytes:
    """The plan as bytes."""
    counts = (
        len(plan.freed_slots),
        len(plan.new_sequences),
        len(plan.chunks),
        len(plan.masks),
        len(plan.copies),
    )
    parts = [_HEADER.pack(plan.epoch, plan.step, *counts, plan.sample_on_device)]
    parts.append(_pack_ids(plan.freed_slots))
    for new in plan.new_sequences:
        parts.extend(_pack_new_sequence(new))
    parts.extend(_pack_chunks(plan.chunks))
    for mask in plan.masks:
        parts += (_MASK.pack(mask.slot, len(mask.bits)), mask.bits)
    parts.extend(_COPY.pack(*copy) for copy in plan.copies)
    return b"".join(parts)


def decode_plan(data: bytes) -> StepPlan:
    """The plan in `data`.

    Raises:
        struct.error, ValueError: `data` is cut short or too long.
    """
    reader = _Reader(data)
    epoch, step, freed_slots, new_sequences, chunks, masks, copies, sample_on_device = reader.take(_HEADER)
    plan = StepPlan(
        epoch,
        step,
        reader.ids(freed_slots),
        tuple(_read_new_sequence(reader) for _ in range(new_sequences)),
        _read_chunks(reader, chunks),
        tuple(_read_mask(reader) for _ in range(masks)),
        tuple(_read_copy(reader) for _ in range(copies)),
        sample_on_device,
    )
    reader.end()
    return plan


def encode_sampled(sampled: Sampled) -> bytes:
    """The sampled tokens as bytes."""
    parts = [_SAMPLED.pack(sampled.step, len(sampled.token_ids), len(sampled.prompt_logprobs))]
    parts.append(_pack_ids(sampled.token_ids))
    parts.extend(_pack_logprobs(sampled.logprobs))
    for prompt in sampled.prompt_logprobs:
        parts += (_COUNT.pack(prompt.chunk), _COUNT.pack(len(prompt.positions)))
        parts.extend(_pack_logprobs(prompt.positions))
    return b"".join(parts)


def decode_sampled(data: bytes) -> Sampled:
    """The sampled tokens in `data`.

    Raises:
        struct.error, ValueError: `data` is cut short or too long.
    """
    reader = _Reader(data)
    step, count, prompts = reader.take(_SAMPLED)
    token_ids = reader.ids(count)
    logprobs = _read_logprobs(reader, count)
    prompt_logprobs = tuple(_read_prompt(reader) for _ in range(prompts))
    reader.end()
    return Sampled(step, token_ids, logprobs, prompt_logprobs)


def _pack_new_sequence(new: NewSequence) -> Iterable[bytes]:
    sampling = new.sampling
    yield _NEW_SEQUENCE.pack(
        new.slot,
        new.prompt_len,
        new.choice,
        -1 if new.logprobs is None else new.logprobs,
        -1 if new.prompt_logprobs is None else new.prompt_logprobs,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.seed,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.min_tokens,
    )
    id_lists = (new.prompt_ids, new.output_ids, new.ends)
    yield _LENGTHS.pack(*map(len, id_lists), len(sampling.logit_bias), len(sampling.bad_words))
    yield from map(_pack_ids, id_lists)
    for token, bias in sampling.logit_bias:
        yield _BIAS.pack(token, bias)
    for word in sampling.bad_words:
        yield _COUNT.pack(len(word)) + _pack_ids(word)


def _pack_chunks(chunks: Sequence[SequenceChunk]) -> Iterable[bytes]:
    """All slots, then all starts, and so on: a call per chunk would take longer than sending the bytes."""
    if chunks:
        slots, starts, token_ids, blocks, samples = zip(*chunks, strict=True)
        growing = [index for index, ids in enumerate(blocks) if ids]  # a decode rarely gets a new block
        yield _pack_ids((len(growing), *slots, *starts, *map(len, token_ids)))
        yield bytes(samples)
        yield _pack_ids(tuple(chain.from_iterable(token_ids)))
        yield _pack_ids((*growing, *(len(blocks[index]) for index in growing)))
        yield _pack_ids(tuple(chain.from_iterable(blocks)))


def _pack_logprobs(entries: Sequence[PositionLogprobs | None]) -> Iterable[bytes]:
    """The number of tokens of each entry, 0 for None; then the tokens of all entries."""
    yield _pack_ids([0 if entry is None else 1 + len(entry.top) for entry in entries])
    for entry in entries:
        if entry is not None:
            for token in (entry.chosen, *entry.top):
                yield _LOGPROB.pack(token.token_id, token.logprob)


def _pack_ids(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


class _Reader:
    """Reads values from a byte string, one after another."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The next values, as `layout` describes them."""
        values = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return values

    def ids(self, count: int) -> tuple[int, ...]:
        """The next `count` unsigned 32-bit numbers."""
        values = struct.unpack_from(f"<{count}I", self._data, self._at)
        self._at += 4 * count
        return values

    def raw(self, size: int) -> bytes:
        """The next `size` bytes."""
        end = self._at + size
        if end > len(self._data):
            raise ValueError("cut short")
        part, self._at = self._data[self._at : end], end
        return part

    def end(self) -> None:
        """Check that all bytes are read.

        Raises:
            ValueError: some are left.
        """
        if self._at != len(self._data):
            raise ValueError(f"{len(self._data) - self._at} bytes after the end")


def _read_new_sequence(reader: _Reader) -> NewSequence:
    (
        slot, prompt_len, choice, logprobs, prompt_logprobs,
        temperature, top_k, top_p, min_p, seed, repetition, presence, frequency, min_tokens,
    ) = reader.take(_NEW_SEQUENCE)  # fmt: skip
    prompt, output, ends, biases, words = reader.take(_LENGTHS)
    prompt_ids, output_ids, end_ids = reader.ids(prompt), reader.ids(output), reader.ids(ends)
    logit_bias = tuple(reader.take(_BIAS) for _ in range(biases))
    bad_words = tuple(reader.ids(*reader.take(_COUNT)) for _ in range(words))
    sampling = SamplingParams(
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        repetition,
        presence,
        frequency,
        logit_bias,
        min_tokens,
        bad_words,
    )
    return NewSequence(
        slot,
        prompt_len,
        choice,
        sampling,
        None if logprobs < 0 else logprobs,
        None if prompt_logprobs < 0 else prompt_logprobs,
        prompt_ids,
        output_ids,
        end_ids,
    )


def _read_copy(reader: _Reader) -> tuple[int, int]:
    source, target = reader.take(_COPY)
    return source, target


def _read_mask(reader: _Reader) -> Mask:
    slot, size = reader.take(_MASK)
    return Mask(slot, reader.raw(size))


def _read_prompt(reader: _Reader) -> PromptLogprobs:
    (chunk,), (count,) = reader.take(_COUNT), reader.take(_COUNT)
    positions = _read_logprobs(reader, count)
    present = tuple(entry for entry in positions if entry is not None)
    if len(present) < count:
        raise ValueError("a prompt token without its log-probability")
    return PromptLogprobs(chunk, present)


def _read_chunks(reader: _Reader, count: int) -> tuple[SequenceChunk, ...]:
    if count == 0:
        return ()
    ((growing,), slots, starts, lengths) = map(reader.ids, (1, count, count, count))
    samples = map(bool, reader.raw(count))
    token_ids = _cut(reader.ids(sum(lengths)), lengths)
    blocks: list[tuple[int, ...]] = [()] * count
    indices, lengths = reader.ids(growing), reader.ids(growing)
    for index, ids in zip(indices, _cut(reader.ids(sum(lengths)), lengths), strict=True):
        if index >= count:
            raise ValueError(f"blocks for chunk {index} of {count}")
        blocks[index] = ids
    fields = zip(slots, starts, token_ids, blocks, samples, strict=True)
    # Like SequenceChunk._make, but without a Python call for each chunk.
    return tuple(map(partial(tuple.__new__, SequenceChunk), fields))


def _cut(ids: tuple[int, ...], lengths: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Consecutive pieces of `ids` with these lengths."""
    if len(ids) == len(lengths) and 0 not in lengths:  # one id each, as in a decode step
        return zip(ids, strict=True)
    return [ids[start:end] for start, end in pairwise(accumulate(lengths, initial=0))]


def _read_logprobs(reader: _Reader, count: int) -> tuple[PositionLogprobs | None, ...]:
    counts = reader.ids(count)
    if not any(counts):
        return (None,) * count
    entries: list[PositionLogprobs | None] = []
    for count in counts:
        tokens = tuple(TokenLogprob(*reader.take(_LOGPROB)) for _ in range(count))
        entries.append(PositionLogprobs(tokens[0], tokens[1:]) if tokens else None)
    return tuple(entries)
