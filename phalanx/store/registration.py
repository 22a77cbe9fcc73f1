"""A process's presence in the store: its lease, its registration and, for a worker, its shard's status.

Owns: the lease and the keys under it, from the first registration to the last revocation.
Does not own: what the status is (`supervisor`), what the cluster makes of it (the controller).

The incarnation stays the same as long as the process lives: a worker that was cut off and comes back with
its engine still running is the same worker. A new process is a new one, even at the same address.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from phalanx.store.interface import (
    Delete,
    LeaseLostError,
    Modified,
    Put,
    Store,
    StoreUnavailableError,
)
from phalanx.store.records import GatewayRecord, Keys, ShardRecord, WorkerRecord, encode

LEASE_TTL_S = 3
_RETRY_S = (0.05, 0.5)  # a random pause, so that a fleet does not come back to the store in one instant
_REVOKE_TIMEOUT_S = 1.0

log = logging.getLogger(__name__)


class Registration:
    """Keeps one worker or gateway known to the cluster."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        who: WorkerRecord | GatewayRecord,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._keys, self._who, self._clock = store, keys, who, clock
        self._known: WorkerRecord | GatewayRecord | None = None  # as last written
        self._lease: int | None = None
        self._record: ShardRecord | None = None
        self._changed = asyncio.Event()
        self.renew_at = clock()  # when the lease is to be renewed, by `clock`
        # The statuses written and not yet removed: key and revision.
        self._written: dict[str, int] = {}

    def announce(self, who: WorkerRecord | GatewayRecord) -> None:
        """Make this what the cluster knows of the process, soon."""
        self._who = who
        self._changed.set()

    def publish(self, record: ShardRecord | None) -> None:
        """Make this the shard's status in the store soon; None removes it. The latest wins."""
        self._record = record
        self._changed.set()

    async def run(self) -> None:
        """Register and stay registered, through lost leases and an absent store, until cancelled."""
        while True:
            try:
                await self._register()
                await self._stay()
            except (LeaseLostError, StoreUnavailableError) as error:
                log.warning("registration lost", extra={"reason": repr(error)})
            await asyncio.sleep(random.uniform(*_RETRY_S))

    async def close(self) -> None:
        """Leave the cluster: everything under the lease goes at once, not when it expires."""
        if self._lease is None:
            return
        try:
            async with asyncio.timeout(_REVOKE_TIMEOUT_S):
                await self._store.revoke(self._lease)
        except (StoreUnavailableError, TimeoutError) as error:
            log.warning("lease left to expire", extra={"reason": repr(error)})

    async def _register(self) -> None:
        # A new lease on every try: the one before may have expired in the meantime, and a write under it
        # would fail for ever.
        sent = self._clock()
        self._lease = await self._store.grant(LEASE_TTL_S)
        await self._write_who(self._lease)
        self._renewed(sent, LEASE_TTL_S)
        self._changed.set()  # the status moves to the new lease
        log.info("registered", extra={"lease": self._lease, "incarnation": self._who.incarnation})

    async def _stay(self) -> None:
        assert self._lease is not None
        while True:
            try:
                async with asyncio.timeout(self.renew_at - self._clock()):
                    await self._changed.wait()
            except TimeoutError:
                sent = self._clock()
                self._renewed(sent, await self._store.refresh(self._lease))
                continue
            self._changed.clear()
            if self._known is not self._who:
                await self._write_who(self._lease)
            await self._write(self._lease)

    async def _write_who(self, lease: int) -> None:
        who = self._who
        key = (
            self._keys.worker(who.worker)
            if isinstance(who, WorkerRecord)
            else self._keys.gateway(who.gateway)
        )
        await self._store.txn([], [Put(key, encode(who), lease)])
        self._known = who

    def _renewed(self, sent: float, ttl_s: float) -> None:
        # Counted from when the renewal was sent: the store may have renewed at any time since.
        self.renew_at = sent + ttl_s / 3

    async def _write(self, lease: int) -> None:
        """Bring the store's copy of the status up to date."""
        record = self._record
        key = None if record is None else self._keys.shard(record.replica, record.rank)
        for old in [old for old in self._written if old != key]:
            # Only what this process wrote: the next holder of the rank may have written since.
            await self._store.txn([Modified(old, self._written[old])], [Delete(old)])
            del self._written[old]
        if record is None or key is None:
            return
        # A status of a past epoch must not cover that of the present one.
        current = Modified(self._keys.assignment(record.replica), record.epoch)
        revision = await self._store.txn([current], [Put(key, encode(record), lease)])
        if revision is None:
            log.info(
                "status of a past epoch dropped", extra={"replica": record.replica, "epoch": record.epoch}
            )
        else:
            self._written[key] = revision
