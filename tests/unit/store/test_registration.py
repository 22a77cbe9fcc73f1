from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import pytest

from phalanx.store.interface import Condition, Operation, Put, StoreUnavailableError
from phalanx.store.keys import Keys
from phalanx.store.memory import MemoryStore
from phalanx.store.records import (
    AssignmentRecord,
    DeploymentRecord,
    ShardRecord,
    ShardState,
    WorkerRecord,
    encode,
)
from phalanx.store.registration import LEASE_TTL_S, Registration
from phalanx.store.snapshot import Snapshot

KEYS = Keys()
WORKER = WorkerRecord("w0", "boot", "host", "127.0.0.1:1", "cpu", 1)


class FlakyStore(MemoryStore):
    """A store that is unreachable while `away` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.tries = asyncio.Event()
        self.outcomes: asyncio.Queue[int | None] = asyncio.Queue()

    def _reach(self) -> None:
        if self.away:
            self.tries.set()
            raise StoreUnavailableError("away")

    async def txn(self, when: Sequence[Condition], then: Sequence[Operation]) -> int | None:
        self._reach()
        revision = await super().txn(when, then)
        self.outcomes.put_nowait(revision)
        return revision

    async def grant(self, ttl_s: int) -> int:
        self._reach()
        return await super().grant(ttl_s)


@pytest.fixture
async def store() -> AsyncIterator[FlakyStore]:
    store = FlakyStore()
    yield store
    await store.close()


@pytest.fixture
async def registration(store: FlakyStore) -> AsyncIterator[Registration]:
    registration = Registration(store, KEYS, WORKER)
    running = asyncio.create_task(registration.run())
    yield registration
    running.cancel()
    await asyncio.wait([running])


async def until(store: MemoryStore, condition: Callable[[Snapshot], bool]) -> Snapshot:
    async with asyncio.timeout(5):
        async for change in store.watch(KEYS.root):
            snapshot = Snapshot.of(change.listing, KEYS)
            if condition(snapshot):
                return snapshot
    raise AssertionError("a watch ended")


async def formed(store: MemoryStore, replica: str = "d-0") -> ShardRecord:
    record = AssignmentRecord(replica, DeploymentRecord("d", 1, "/m"), ())
    epoch = await store.txn([], [Put(KEYS.assignment(replica), encode(record))])
    assert epoch is not None
    return ShardRecord(replica, 0, epoch, "w0", "boot", ShardState.STARTING)


async def test_a_worker_registers_and_its_status_follows(
    store: FlakyStore, registration: Registration
) -> None:
    snapshot = await until(store, lambda snapshot: bool(snapshot.workers))
    assert snapshot.workers["w0"] == WORKER
    record = await formed(store)
    registration.publish(record)
    snapshot = await until(store, lambda snapshot: bool(snapshot.shards))
    assert snapshot.shard("d-0", 0) == record


async def test_everything_goes_with_the_lease(store: FlakyStore, registration: Registration) -> None:
    registration.publish(await formed(store))
    await until(store, lambda snapshot: bool(snapshot.workers and snapshot.shards))
    await registration.close()
    snapshot = await until(store, lambda _: True)
    assert not snapshot.workers
    assert not snapshot.shards


async def test_a_status_of_a_past_epoch_never_covers_the_present_one(
    store: FlakyStore, registration: Registration
) -> None:
    past, present = await formed(store), await formed(store)
    registration.publish(present)
    await until(store, lambda snapshot: bool(snapshot.shards))
    while not store.outcomes.empty():
        store.outcomes.get_nowait()
    registration.publish(replace(past, state=ShardState.FAILED))
    async with asyncio.timeout(5):
        assert await store.outcomes.get() is None
    snapshot = await until(store, lambda _: True)
    assert snapshot.shard("d-0", 0) == present
    registration.publish(None)
    snapshot = await until(store, lambda snapshot: not snapshot.shards)
    assert snapshot.workers


async def test_a_move_removes_the_old_status_unless_another_has_written_it_since(
    store: FlakyStore, registration: Registration
) -> None:
    old = await formed(store, "d-0")
    registration.publish(old)
    await until(store, lambda snapshot: bool(snapshot.shards))
    theirs = replace(old, worker="w1")
    await store.txn([], [Put(KEYS.shard("d-0", 0), encode(theirs))])
    registration.publish(await formed(store, "d-1"))
    snapshot = await until(store, lambda snapshot: ("d-1", 0) in snapshot.shards)
    assert snapshot.shards["d-0", 0] == theirs


async def test_a_lost_lease_is_replaced_with_the_same_incarnation_and_status(
    store: FlakyStore, registration: Registration
) -> None:
    record = await formed(store)
    registration.publish(record)
    await until(store, lambda snapshot: bool(snapshot.workers and snapshot.shards))
    await store.revoke(1)
    # A write under the lost lease is refused: the worker need not wait for its next renewal.
    ready = replace(record, state=ShardState.READY)
    registration.publish(ready)
    snapshot = await until(store, lambda snapshot: bool(snapshot.workers and snapshot.shards))
    assert snapshot.workers["w0"] == WORKER
    assert snapshot.shard("d-0", 0) == ready


async def test_an_absent_store_is_awaited(store: FlakyStore, registration: Registration) -> None:
    await until(store, lambda snapshot: bool(snapshot.workers))
    record = await formed(store)
    store.away = True
    registration.publish(record)
    async with asyncio.timeout(5):
        await store.tries.wait()
    store.away = False
    snapshot = await until(store, lambda snapshot: bool(snapshot.shards))
    assert snapshot.workers["w0"] == WORKER


async def test_the_lease_is_counted_from_when_its_renewal_was_sent(store: FlakyStore) -> None:
    now = 100.0
    due: list[float] = []
    renewed = asyncio.Event()

    class SlowStore(FlakyStore):
        async def grant(self, ttl_s: int) -> int:
            nonlocal now
            now += LEASE_TTL_S / 3  # the response takes as long as the first renewal may wait
            return await super().grant(ttl_s)

        async def refresh(self, lease: int) -> float:
            due.append(registration.renew_at)
            renewed.set()
            return await super().refresh(lease)

    slow = SlowStore()
    registration = Registration(slow, KEYS, WORKER, clock=lambda: now)
    running = asyncio.create_task(registration.run())
    async with asyncio.timeout(10):
        await renewed.wait()
    running.cancel()
    await asyncio.wait([running])
    await slow.close()
    assert due[0] == 100.0 + LEASE_TTL_S / 3


async def test_what_a_worker_says_of_itself_later_is_written_under_the_same_lease(
    store: FlakyStore, registration: Registration
) -> None:
    await until(store, lambda snapshot: "w0" in snapshot.workers)
    registration.announce(replace(WORKER, draining=True))
    await until(store, lambda snapshot: snapshot.workers["w0"].draining)
    await registration.close()
    await until(store, lambda snapshot: not snapshot.workers)
