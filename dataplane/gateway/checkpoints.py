"""Checkpoints of long requests in the store, for the case that a gateway and a leader die together.

Only gateways write checkpoints, each those of its own live requests. All keys of a gateway are under one
lease, which outlives the gateway by `TTL_S`. The checkpoint of a request that has ended is deleted.

Owns: this gateway's lease, the transactions, the keys that are still to be deleted.
Does not own: which parts are due (`checkpoint_plan`), when a client may resume a request (`resumption`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from google.protobuf.message import DecodeError

from dataplane.gateway.checkpoint_plan import Candidate, CheckpointPlan, Part, Restored, restore
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

TTL_S = 60
MAX_OPERATIONS = 64  # of a transaction
MAX_BYTES = 1 << 19  # of a transaction; etcd takes three times as much
MAX_PART_BYTES = 5 << 18  # of a part that is larger than MAX_BYTES, and so alone in its transaction
_TICK_S = 0.25

log = logging.getLogger(__name__)


class Checkpoints:
    """Carries out the plan of one gateway. `run` writes until cancelled; the store may be away for any time.

    Keys carry the gateway's incarnation: after a client has moved to another gateway, the old gateway deletes
    only its own parts.
    """

    def __init__(
        self, store: Store, keys: Keys, incarnation: str, candidates: Callable[[], Iterable[Candidate]]
    ) -> None:
        self._store, self._keys, self._incarnation, self._candidates = store, keys, incarnation, candidates
        self._plan = CheckpointPlan()
        self._to_delete: list[str] = []  # keys of parts whose requests have ended
        self._lease: int | None = None
        self._refresh_at = 0.0

    def forget(self, resume_key: str) -> None:
        """A request has ended: its checkpoint is deleted soon."""
        parts = self._plan.forget(resume_key)
        self._to_delete += [self._key(resume_key, number) for number in range(parts)]

    def _key(self, resume_key: str, number: int) -> str:
        return self._keys.checkpoint(resume_key, self._incarnation, number)

    async def load(self, resume_key: str) -> Restored | None:
        """A request that some gateway has left, or None. Raises StoreUnavailableError."""
        listing = await self._store.list(self._keys.checkpoints(resume_key))
        by_gateway: dict[str, list[state_pb2.CheckpointRecord]] = {}
        try:
            for key in sorted(listing.entries):
                record = state_pb2.CheckpointRecord.FromString(listing.entries[key].value)
                by_gateway.setdefault(key.rpartition("/")[0], []).append(record)
        except DecodeError:
            log.warning("unreadable checkpoint ignored")
            return None
        restored = [one for records in by_gateway.values() if (one := restore(records, time.time()))]
        return max(restored, key=lambda one: one.journal.tokens, default=None)

    async def run(self) -> None:
        """Write the parts that are due, every `_TICK_S`, until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                await self._write()
            except LeaseLostError:
                self._lease = None
                self._plan.lease_lost()
            except StoreUnavailableError as error:
                log.debug("checkpoints wait for the store", extra={"reason": repr(error)})
            except StoreError:
                log.exception("checkpoints not written")  # requests continue without checkpoints

    async def _write(self) -> None:
        """Write the parts that are due and delete those of ended requests, many in one transaction."""
        parts = self._due()
        if not parts and not self._to_delete and self._lease is None:
            return
        lease = await self._hold_lease()
        # A request that ended here and was resumed here writes the same keys again: do not delete them.
        rewritten = {self._key(part.resume_key, part.number) for part, _ in parts}
        self._to_delete = [key for key in self._to_delete if key not in rewritten]
        while parts or self._to_delete:
            deleted, self._to_delete = self._to_delete[:MAX_OPERATIONS], self._to_delete[MAX_OPERATIONS:]
            taken = self._take(parts, MAX_OPERATIONS - len(deleted))
            operations: list[Operation] = [Delete(key) for key in deleted]
            for part, value in taken:
                operations.append(Put(self._key(part.resume_key, part.number), value, lease))
            try:
                await self._store.txn([], operations)
            except StoreError:
                self._to_delete += deleted
                raise
            self._written([part for part, _ in taken])
            del parts[: len(taken)]

    def _due(self) -> list[tuple[Part, bytes]]:
        """The parts to write now, serialised. A part that is too large ends its request's checkpoint."""
        due = []
        for part in self._plan.due(self._candidates(), time.monotonic(), time.time()):
            value = part.record.SerializeToString()
            if len(value) > MAX_PART_BYTES:
                log.warning("too large for the store: a checkpoint ends", extra={"tokens": part.tokens})
                self._plan.too_large(part)
            else:
                due.append((part, value))
        return due

    def _written(self, parts: Iterable[Part]) -> None:
        """A transaction has put these parts. Meanwhile their requests may have ended, or been resumed."""
        live = {candidate.journal.resume_key for candidate in self._candidates()}
        for part in parts:
            if part.resume_key in live and part.number == self._plan.num_parts(part.resume_key):
                self._plan.written(part, time.monotonic())
            else:  # `forget` came before the store had this part: delete it like the parts before it
                self._to_delete.append(self._key(part.resume_key, part.number))

    @staticmethod
    def _take(parts: Sequence[tuple[Part, bytes]], max_parts: int) -> Sequence[tuple[Part, bytes]]:
        """The first parts, as many as fit a transaction, but at least one unless `max_parts` is 0."""
        sizes = accumulate(len(value) for _, value in parts[:max_parts])
        return parts[: max(1, sum(size <= MAX_BYTES for size in sizes))] if max_parts else []

    async def _hold_lease(self) -> int:
        """The lease, granted or refreshed if need be."""
        now = time.monotonic()
        if self._lease is None:
            self._lease = await self._store.grant(TTL_S)
        elif now >= self._refresh_at:
            await self._store.refresh(self._lease)
        else:
            return self._lease
        self._refresh_at = now + TTL_S / 3
        return self._lease
