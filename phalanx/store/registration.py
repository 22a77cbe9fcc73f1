"""Keeps one worker or gateway registered, by a lease and the keys under it.

Owns: the lease, the registration and, for a worker, the key with its shard's status.
Does not own: the content of the status (the worker's supervisor), the reaction to it (the controller).

The incarnation stays the same for the life of the process. A worker that lost its lease and registers
again with its engine still running is the same incarnation. A new process is a new incarnation, even
at the same address.
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
from phalanx.store.keys import Keys
from phalanx.store.records import GatewayRecord, ShardRecord, WorkerRecord, encode

LEASE_TTL_S = 3
_RETRY_S = (0.05, 0.5)  # a random pause, so that a fleet does not return to the store all at once
_REVOKE_TIMEOUT_S = 1.0

log = logging.getLogger(__name__)


class Registration:
    """Registers one process and stays registered until `close`."""

    def __init__(
        self,
        store: Store,
        keys: Keys,
        process: WorkerRecord | GatewayRecord,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._keys, self._process, self._clock = store, keys, process, clock
        self._written_process: WorkerRecord | GatewayRecord | None = None
        self._lease: int | None = None
        self._status: ShardRecord | None = None
        self._changed = asyncio.Event()
        self.renew_at = clock()  # when to renew the lease, by `clock`
        # The revision of each status that this process wrote and has not deleted, by key.
        self._written_statuses: dict[str, int] = {}

    def announce(self, process: WorkerRecord | GatewayRecord) -> None:
        """Replace the registration; `run` writes it. The latest call wins."""
        self._process = process
        self._changed.set()

    def publish(self, status: ShardRecord | None) -> None:
        """Replace the shard's status; `run` writes it. None deletes it. The latest call wins."""
        self._status = status
        self._changed.set()

    async def run(self) -> None:
        """Register and stay registered until cancelled. A lost lease or a lost store is retried."""
        while True:
            try:
                await self._register()
                await self._stay_registered()
            except (LeaseLostError, StoreUnavailableError) as error:
                log.warning("registration lost", extra={"reason": repr(error)})
            await asyncio.sleep(random.uniform(*_RETRY_S))

    async def close(self) -> None:
        """Revoke the lease, so that its keys are deleted now and not when the lease expires."""
        if self._lease is None:
            return
        try:
            async with asyncio.timeout(_REVOKE_TIMEOUT_S):
                await self._store.revoke(self._lease)
        except (StoreUnavailableError, TimeoutError) as error:
            log.warning("lease left to expire", extra={"reason": repr(error)})

    async def _register(self) -> None:
        # Each attempt takes a new lease: the last one may have expired, and then every write under it fails.
        sent_at = self._clock()
        self._lease = await self._store.grant(LEASE_TTL_S)
        await self._write_process(self._lease)
        self._schedule_renewal(sent_at, LEASE_TTL_S)
        self._changed.set()  # rewrite the status under the new lease
        log.info("registered", extra={"lease": self._lease, "incarnation": self._process.incarnation})

    async def _stay_registered(self) -> None:
        assert self._lease is not None
        while True:
            try:
                async with asyncio.timeout(self.renew_at - self._clock()):
                    await self._changed.wait()
            except TimeoutError:
                sent_at = self._clock()
                self._schedule_renewal(sent_at, await self._store.refresh(self._lease))
                continue
            self._changed.clear()
            if self._written_process is not self._process:
                await self._write_process(self._lease)
            await self._write_status(self._lease)

    async def _write_process(self, lease: int) -> None:
        process = self._process
        key = (
            self._keys.worker(process.worker)
            if isinstance(process, WorkerRecord)
            else self._keys.gateway(process.gateway)
        )
        await self._store.txn([], [Put(key, encode(process), lease)])
        self._written_process = process

    def _schedule_renewal(self, sent_at: float, ttl_s: float) -> None:
        # The store counts from when it handled the request, which may be as early as `sent_at`.
        self.renew_at = sent_at + ttl_s / 3

    async def _write_status(self, lease: int) -> None:
        """Delete the statuses of ranks that this worker had before, and write the current one."""
        status = self._status
        key = None if status is None else self._keys.shard(status.replica, status.rank)
        for old in [old for old in self._written_statuses if old != key]:
            # The condition: the rank's next worker may have overwritten the status, and that one must stay.
            await self._store.txn([Modified(old, self._written_statuses[old])], [Delete(old)])
            del self._written_statuses[old]
        if status is None or key is None:
            return
        # The epoch guard: a status of a past epoch must not overwrite one of the current epoch.
        epoch_is_current = Modified(self._keys.assignment(status.replica), status.epoch)
        revision = await self._store.txn([epoch_is_current], [Put(key, encode(status), lease)])
        if revision is None:
            log.info(
                "status of a past epoch dropped", extra={"replica": status.replica, "epoch": status.epoch}
            )
        else:
            self._written_statuses[key] = revision
