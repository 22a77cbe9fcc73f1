"""One step as the leader decides it and every rank executes it, and what the step drew.

A plan is a difference: ranks keep, per sequence handle, what earlier plans said about it. It is
applied in the order leaves, joins, rows, so that a handle or block freed by a leave can be used again
in the same plan. Bytes are little-endian integers and floats, no pickle.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.request import PositionLogprobs, SamplingParams, TokenLogprob

_HEADER = struct.Struct("<qqIII")  # epoch, step, leaves, joins, rows
_JOIN = struct.Struct("<IIIidqddQ")
_ROW = struct.Struct("<IIIIB")  # handle, start, tokens, blocks, sample
_SAMPLED = struct.Struct("<qI")  # step, tokens
_LOGPROBS = struct.Struct("<i")  # alternatives, -1 without log-probabilities
_TOKEN = struct.Struct("<Id")


@dataclass(frozen=True, slots=True)
class Join:
    """A sequence that takes a handle: how it is sampled, and where its output begins."""

    handle: int
    prompt_len: int
    choice: int
    sampling: SamplingParams
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Consecutive tokens of one sequence.

    `start` is the position of the first; `blocks` are appended to its block table; with `sample`
    the token after the last is drawn.
    """

    handle: int
    start: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    sample: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything that one step does. Steps of an epoch are numbered from 1 without gaps."""

    epoch: int
    step: int
    leaves: tuple[int, ...] = ()
    joins: tuple[Join, ...] = ()
    rows: tuple[Row, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens drawn in a step, in the order of the plan's rows that sample."""

    step: int
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs | None, ...]


def encode_plan(plan: StepPlan) -> bytes:
    """The plan as bytes."""
    parts = [_HEADER.pack(plan.epoch, plan.step, len(plan.leaves), len(plan.joins), len(plan.rows))]
    parts.append(_pack_ids(plan.leaves))
    for join in plan.joins:
        s = join.sampling
        logprobs = -1 if join.logprobs is None else join.logprobs
        parts.append(
            _JOIN.pack(
                join.handle,
                join.prompt_len,
                join.choice,
                logprobs,
                s.temperature,
                s.top_k,
                s.top_p,
                s.min_p,
                s.seed,
            )
        )
    for row in plan.rows:
        parts.append(_ROW.pack(row.handle, row.start, len(row.token_ids), len(row.blocks), row.sample))
        parts.append(_pack_ids(row.token_ids))
        parts.append(_pack_ids(row.blocks))
    return b"".join(parts)


def decode_plan(data: bytes) -> StepPlan:
    """The plan in `data`. Raises struct.error or ValueError when it is cut short or too long."""
    reader = _Reader(data)
    epoch, step, leaves, joins, rows = reader.take(_HEADER)
    plan = StepPlan(
        epoch,
        step,
        reader.ids(leaves),
        tuple(_read_join(reader) for _ in range(joins)),
        tuple(_read_row(reader) for _ in range(rows)),
    )
    reader.end()
    return plan


def encode_sampled(sampled: Sampled) -> bytes:
    """The drawn tokens as bytes."""
    parts = [_SAMPLED.pack(sampled.step, len(sampled.token_ids)), _pack_ids(sampled.token_ids)]
    for entry in sampled.logprobs:
        parts.append(_LOGPROBS.pack(-1 if entry is None else len(entry.top)))
        if entry is not None:
            parts.extend(_TOKEN.pack(token.token_id, token.logprob) for token in (entry.chosen, *entry.top))
    return b"".join(parts)


def decode_sampled(data: bytes) -> Sampled:
    """The drawn tokens in `data`. Raises struct.error or ValueError when it is cut short or too long."""
    reader = _Reader(data)
    step, count = reader.take(_SAMPLED)
    token_ids = reader.ids(count)
    logprobs = tuple(_read_logprobs(reader) for _ in range(count))
    reader.end()
    return Sampled(step, token_ids, logprobs)


def _pack_ids(ids: Iterable[int]) -> bytes:
    values = tuple(ids)
    return struct.pack(f"<{len(values)}I", *values)


class _Reader:
    """A place in a byte string."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The values that `layout` describes."""
        values = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return values

    def ids(self, count: int) -> tuple[int, ...]:
        """`count` unsigned 32-bit numbers."""
        return self.take(struct.Struct(f"<{count}I"))

    def end(self) -> None:
        """See that nothing is left."""
        if self._at != len(self._data):
            raise ValueError(f"{len(self._data) - self._at} bytes after the end")


def _read_join(reader: _Reader) -> Join:
    handle, prompt_len, choice, logprobs, temperature, top_k, top_p, min_p, seed = reader.take(_JOIN)
    sampling = SamplingParams(temperature, top_k, top_p, min_p, seed)
    return Join(handle, prompt_len, choice, sampling, None if logprobs < 0 else logprobs)


def _read_row(reader: _Reader) -> Row:
    handle, start, tokens, blocks, sample = reader.take(_ROW)
    return Row(handle, start, reader.ids(tokens), reader.ids(blocks), bool(sample))


def _read_logprobs(reader: _Reader) -> PositionLogprobs | None:
    (alternatives,) = reader.take(_LOGPROBS)
    if alternatives < 0:
        return None
    chosen, *top = (TokenLogprob(*reader.take(_TOKEN)) for _ in range(alternatives + 1))
    return PositionLogprobs(chosen, tuple(top))
