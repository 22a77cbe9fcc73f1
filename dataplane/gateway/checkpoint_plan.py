"""Checkpoints as values: which parts are due, what they contain, which request they restore. Pure.

A request gets its first checkpoint part once it is `AFTER_S` old. Each later part has the output
since the part before.

Owns: how much of each live request is in the store.
Does not own: the store (`checkpoints`), requests (`journal`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dataplane.gateway.journal import Journal
from dataplane.gateway.resume import Cursor
from phalanx.internal.v1 import state_pb2

AFTER_S = 1.0
EVERY_S = 2.0
EVERY_TOKENS = 100


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live request that may need a checkpoint. Times are on the monotonic clock."""

    journal: Journal
    opened: float
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One part to write. Once it is written, the store has the request up to `cursor`: `tokens` in all."""

    resume_key: str
    number: int
    cursor: Cursor
    tokens: int
    record: state_pb2.CheckpointRecord


@dataclass(frozen=True, slots=True)
class _Progress:
    """How much of a request is in the store."""

    at: float
    cursor: Cursor
    tokens: int
    parts: int


class CheckpointPlan:
    """Decides which parts to write.

    `now` is in seconds on the monotonic clock, `wall` in seconds since the Unix epoch.
    """

    def __init__(self) -> None:
        self._written: dict[str, _Progress] = {}
        self._too_large: set[str] = set()  # requests that get no further parts

    def due(self, candidates: Iterable[Candidate], now: float, wall: float) -> list[Part]:
        """The parts to write now."""
        return [self._part(candidate, now, wall) for candidate in candidates if self._is_due(candidate, now)]

    def written(self, part: Part, now: float) -> None:
        """A part is in the store."""
        self._written[part.resume_key] = _Progress(now, part.cursor, part.tokens, part.number + 1)

    def num_parts(self, resume_key: str) -> int:
        """How many parts of a request are in the store."""
        progress = self._written.get(resume_key)
        return 0 if progress is None else progress.parts

    def forget(self, resume_key: str) -> int:
        """A request has ended. Returns how many parts of it are in the store."""
        self._too_large.discard(resume_key)
        parts = self.num_parts(resume_key)
        self._written.pop(resume_key, None)
        return parts

    def too_large(self, part: Part) -> None:
        """A part is larger than the store takes: its request gets no further parts."""
        self._too_large.add(part.resume_key)

    def lease_lost(self) -> None:
        """The store has deleted every part: write all requests again from their beginning."""
        self._written.clear()

    def _is_due(self, candidate: Candidate, now: float) -> bool:
        journal = candidate.journal
        if journal.resume_key in self._too_large:
            return False
        if not journal.accepted or journal.closed or now < candidate.opened + AFTER_S:
            return False
        progress = self._written.get(journal.resume_key)
        if progress is None:
            return True
        new_tokens = journal.tokens - progress.tokens
        return new_tokens >= EVERY_TOKENS or (new_tokens > 0 and now >= progress.at + EVERY_S)

    def _part(self, candidate: Candidate, now: float, wall: float) -> Part:
        journal, progress = candidate.journal, self._written.get(candidate.journal.resume_key)
        record = state_pb2.CheckpointRecord(
            deltas=journal.since(journal.start if progress is None else progress.cursor)
        )
        if progress is None:
            record.model, record.written_at = journal.model, wall
            record.request.CopyFrom(journal.pinned())
            if candidate.deadline is not None:
                record.request.deadline_ms = max(1, int((candidate.deadline - now) * 1000))
            record.eos_token_ids.extend(journal.eos_token_ids)
        cursor = tuple(len(choice.token_ids) for choice in journal.choices)
        number = 0 if progress is None else progress.parts
        return Part(journal.resume_key, number, cursor, journal.tokens, record)


@dataclass(frozen=True, slots=True)
class Restored:
    """A request from its checkpoint. `timeout_s` is the time left until its deadline; None without one."""

    journal: Journal
    timeout_s: float | None


def restore(records: Sequence[state_pb2.CheckpointRecord], wall: float) -> Restored | None:
    """The request in a checkpoint's parts, which are in order; None if the first part is missing.

    Parts after a gap are ignored: the tokens after the gap are generated again.
    """
    if not records or not records[0].model:
        return None
    first = records[0]
    first.request.takeovers += 1
    journal = Journal.restore(first.model, first.request, first.eos_token_ids)
    for record in records:
        fits = [journal.append(delta) for delta in record.deltas]
        if not all(fits):
            break
    if not first.request.deadline_ms:
        return Restored(journal, None)
    return Restored(journal, first.request.deadline_ms / 1000 - max(0.0, wall - first.written_at))
