"""Checkpoints of long requests in the store, for the case that a gateway and a leader die together.

Owns: what of each live request has been written, and when the next part is due.
Does not own: requests (`journal`), or when a client may resume one (`gateway`).

A request is written once it is `AFTER_S` old, and then in parts: each has what was delivered since the one
before. Writes of many requests share a transaction. All of it is under one lease, which outlives the gateway
by `TTL_S`; what has ended is deleted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from google.protobuf.message import DecodeError

from dataplane.gateway.journal import Journal
from dataplane.gateway.resume import Cursor
from phalanx.internal.v1 import state_pb2
from phalanx.store.interface import (
    Delete,
    LeaseLostError,
    Operation,
    Put,
    Store,
    StoreError,
    StoreUnavailableError,
)
from phalanx.store.keys import Keys

AFTER_S = 1.0
EVERY_S = 2.0
EVERY_TOKENS = 100
TTL_S = 60
MAX_OPERATIONS = 64
MAX_BYTES = 1 << 19  # of a transaction; etcd takes three times as much
MAX_PART_BYTES = 5 << 18  # of a part, which is then alone in its transaction
_TICK_S = 0.25

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live request: when it was opened, and when its time is up, on the monotonic clock."""

    journal: Journal
    opened: float
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One part to be written; `cursor` and `tokens` are what is safe once it has been."""

    resume_key: str
    number: int
    cursor: Cursor
    tokens: int
    record: state_pb2.CheckpointRecord


@dataclass(frozen=True, slots=True)
class _Mark:
    at: float
    cursor: Cursor
    tokens: int
    parts: int


class Plan:
    """What is due. Pure: `now` is seconds on the monotonic clock, `wall` since the Unix epoch."""

    def __init__(self) -> None:
        self._marks: dict[str, _Mark] = {}
        self._refused: set[str] = set()  # requests that do not fit into the store

    def due(self, candidates: Iterable[Candidate], now: float, wall: float) -> list[Part]:
        """The parts to write now."""
        return [self._part(candidate, now, wall) for candidate in candidates if self._is_due(candidate, now)]

    def written(self, part: Part, now: float) -> None:
        """A part is in the store."""
        self._marks[part.resume_key] = _Mark(now, part.cursor, part.tokens, part.number + 1)

    def forget(self, resume_key: str) -> int:
        """A request is over; returns how many parts of it may be in the store."""
        self._refused.discard(resume_key)
        mark = self._marks.pop(resume_key, None)
        return 0 if mark is None else mark.parts

    def refused(self, part: Part) -> None:
        """A part is larger than the store takes: its request has no further ones."""
        self._refused.add(part.resume_key)

    def lost(self) -> None:
        """The store has dropped everything."""
        self._marks.clear()

    def _is_due(self, candidate: Candidate, now: float) -> bool:
        journal = candidate.journal
        if journal.resume_key in self._refused:
            return False
        if not journal.accepted or journal.closed or now < candidate.opened + AFTER_S:
            return False
        mark = self._marks.get(journal.resume_key)
        if mark is None:
            return True
        fresh = journal.tokens - mark.tokens
        return fresh >= EVERY_TOKENS or (fresh > 0 and now >= mark.at + EVERY_S)

    def _part(self, candidate: Candidate, now: float, wall: float) -> Part:
        journal, mark = candidate.journal, self._marks.get(candidate.journal.resume_key)
        record = state_pb2.CheckpointRecord(
            deltas=journal.since(journal.start if mark is None else mark.cursor)
        )
        if mark is None:
            record.model, record.written_at = journal.model, wall
            record.request.CopyFrom(journal.pinned())
            if candidate.deadline is not None:
                record.request.deadline_ms = max(1, int((candidate.deadline - now) * 1000))
            record.eos_token_ids.extend(journal.eos_token_ids)
        cursor = tuple(len(choice.token_ids) for choice in journal.choices)
        number = 0 if mark is None else mark.parts
        return Part(journal.resume_key, number, cursor, journal.tokens, record)


@dataclass(frozen=True, slots=True)
class Restored:
    """A request as its checkpoint has it; `timeout_s` is the time left to it."""

    journal: Journal
    timeout_s: float | None


def restore(records: Sequence[state_pb2.CheckpointRecord], wall: float) -> Restored | None:
    """The request in the parts of a checkpoint, in order; None where there is none.

    A part that does not follow the one before ends it: what is missing is generated again.
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


class Checkpoints:
    """The plan carried out for one boot of a gateway. `run` writes until cancelled.

    The store may be away for any time. Every boot has its own parts, so that one which a request has left
    deletes nothing of the one that has it now.
    """

    def __init__(
        self, store: Store, keys: Keys, boot: str, candidates: Callable[[], Iterable[Candidate]]
    ) -> None:
        self._store, self._keys, self._boot, self._candidates = store, keys, boot, candidates
        self._plan = Plan()
        self._doomed: list[str] = []  # keys of parts whose requests are over
        self._lease: int | None = None
        self._renew_at = 0.0

    def forget(self, resume_key: str) -> None:
        """A request is over: its checkpoint is deleted soon."""
        parts = self._plan.forget(resume_key)
        self._doomed += [self._key(resume_key, number) for number in range(parts)]

    def _key(self, resume_key: str, number: int) -> str:
        return self._keys.checkpoint(resume_key, self._boot, number)

    async def load(self, resume_key: str) -> Restored | None:
        """A request that some gateway has left, or None. Raises StoreUnavailableError."""
        listing = await self._store.list(self._keys.checkpoints(resume_key))
        boots: dict[str, list[state_pb2.CheckpointRecord]] = {}
        try:
            for key in sorted(listing.entries):
                record = state_pb2.CheckpointRecord.FromString(listing.entries[key].value)
                boots.setdefault(key.rpartition("/")[0], []).append(record)
        except DecodeError:
            log.warning("unreadable checkpoint passed over")
            return None
        restored = [one for records in boots.values() if (one := restore(records, time.time()))]
        return max(restored, key=lambda one: one.journal.tokens, default=None)

    async def run(self) -> None:
        """Write what is due, again and again."""
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                await self._round()
            except LeaseLostError:
                self._lease = None
                self._plan.lost()
            except StoreUnavailableError as error:
                log.debug("checkpoints wait for the store", extra={"reason": repr(error)})
            except StoreError:
                log.exception("checkpoints not written")  # requests go on without

    async def _round(self) -> None:
        parts = [
            (part, part.record.SerializeToString())
            for part in self._plan.due(self._candidates(), time.monotonic(), time.time())
        ]
        for part in [part for part, value in parts if len(value) > MAX_PART_BYTES]:
            log.warning("too large for the store: a checkpoint ends", extra={"tokens": part.tokens})
            self._plan.refused(part)
        parts = [(part, value) for part, value in parts if len(value) <= MAX_PART_BYTES]
        if not parts and not self._doomed and self._lease is None:
            return
        lease = await self._hold_lease()
        # A request that was ended and resumed here again has its parts again.
        again = {self._key(part.resume_key, part.number) for part, _ in parts}
        self._doomed = [key for key in self._doomed if key not in again]
        while parts or self._doomed:
            doomed, self._doomed = self._doomed[:MAX_OPERATIONS], self._doomed[MAX_OPERATIONS:]
            taken = self._take(parts, MAX_OPERATIONS - len(doomed))
            operations: list[Operation] = [Delete(key) for key in doomed]
            for part, value in taken:
                operations.append(Put(self._key(part.resume_key, part.number), value, lease))
            try:
                await self._store.txn([], operations)
            except StoreError:
                self._doomed += doomed
                raise
            live = {candidate.journal.resume_key for candidate in self._candidates()}
            for part, _ in taken:
                if part.resume_key in live:
                    self._plan.written(part, time.monotonic())
                else:  # it has ended meanwhile
                    self._doomed.append(self._key(part.resume_key, part.number))
            del parts[: len(taken)]

    @staticmethod
    def _take(parts: Sequence[tuple[Part, bytes]], most: int) -> Sequence[tuple[Part, bytes]]:
        """The first parts, as many as fit a transaction, at least one where there is room for any."""
        sizes = accumulate(len(value) for _, value in parts[:most])
        return parts[: max(1, sum(size <= MAX_BYTES for size in sizes))] if most else []

    async def _hold_lease(self) -> int:
        now = time.monotonic()
        if self._lease is None:
            self._lease = await self._store.grant(TTL_S)
        elif now >= self._renew_at:
            await self._store.refresh(self._lease)
        else:
            return self._lease
        self._renew_at = now + TTL_S / 3
        return self._lease
