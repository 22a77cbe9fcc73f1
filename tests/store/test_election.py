"""The election of the active controller, on both stores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from controlplane.decisions.actions import MarkReady
from controlplane.election import hold_lock
from controlplane.fencing import Lock, fenced
from phalanx.cli.local.embedded_etcd import running
from phalanx.store.etcd import EtcdStore
from phalanx.store.interface import Delete, Put, Store, StoreUnavailableError
from phalanx.store.keys import Keys
from phalanx.store.records import ReadyRecord
from tests.store.conftest import DEADLINE_S, until


class Candidate:
    """Competes for the lock in its own task. Sets `elected`, then `ended` when it lost the lock."""

    def __init__(self, store: Store, key: str, name: bytes, ttl_s: int = 2) -> None:
        self.lock: Lock | None = None
        self.elected = asyncio.Event()
        self.ended = asyncio.Event()
        self.task = asyncio.create_task(self._run(store, key, name, ttl_s))

    async def _run(self, store: Store, key: str, name: bytes, ttl_s: int) -> None:
        async with hold_lock(store, key, name, ttl_s) as self.lock:
            self.elected.set()
            await asyncio.Event().wait()
        self.ended.set()

    async def holds_lock(self) -> Lock:
        async with asyncio.timeout(DEADLINE_S):
            await self.elected.wait()
        assert self.lock is not None
        return self.lock

    async def release(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


@pytest.fixture
async def candidates(store: Store, root: str):  # type: ignore[no-untyped-def]
    started: list[Candidate] = []

    def start(name: bytes) -> Candidate:
        started.append(Candidate(store, root + "leader", name))
        return started[-1]

    yield start
    for candidate in started:
        await candidate.release()


Start = Callable[[bytes], Candidate]


async def test_the_fence_is_the_keys_create_revision(store: Store, root: str, candidates: Start) -> None:
    lock = await candidates(b"one").holds_lock()
    entry = await store.get(root + "leader")
    assert entry is not None
    assert (entry.value, entry.create_revision) == (b"one", lock.fence)


async def test_one_leads_and_the_next_follows_when_it_resigns(
    store: Store, root: str, candidates: Start
) -> None:
    first = candidates(b"one")
    old = await first.holds_lock()
    second = candidates(b"two")
    async with aclosing(store.watch(root)) as changes:
        await anext(changes)
        assert not second.elected.is_set()
        await first.release()
        seen = await until(changes, lambda change: bool(change.listing.entries))
    new = await second.holds_lock()
    assert seen[-1].listing.entries[root + "leader"].value == b"two"
    assert new.fence > old.fence


async def test_a_former_leader_cannot_write(store: Store, root: str, candidates: Start) -> None:
    """Its lease lives and it knows the lock's newest mod_revision: only its fencing token is old."""
    keys = Keys(root.strip("/"))
    old = await candidates(b"one").holds_lock()
    assignment = keys.assignment("a-0")
    epoch = await store.txn([], [Put(assignment, b"")])
    assert epoch is not None
    mark = MarkReady(ReadyRecord("a-0", epoch, 0.0))
    await store.txn([], [Delete(old.key)])  # as an operator may; the lease of "one" stays
    new = await candidates(b"two").holds_lock()
    assert await store.txn(*fenced([mark], keys, old, new.fence)) is None
    assert await store.get(keys.ready("a-0")) is None
    assert await store.refresh(old.lease) > 0
    assert await store.txn(*fenced([mark], keys, new, new.fence)) is not None


async def test_a_leader_that_does_nothing_stays(store: Store, root: str, candidates: Start) -> None:
    """Its lease is refreshed: a later lease with the same time to live, not refreshed, ends first."""
    candidate = candidates(b"one")
    await candidate.holds_lock()
    lease = await store.grant(2)
    await store.txn([], [Put(root + "clock", b"", lease)])
    async with aclosing(store.watch(root)) as changes:
        await until(changes, lambda change: root + "clock" not in change.listing.entries)
    assert not candidate.ended.is_set()
    assert await store.get(root + "leader") is not None


async def test_a_leader_whose_lease_ended_stops(store: Store, candidates: Start) -> None:
    candidate = candidates(b"one")
    await store.revoke((await candidate.holds_lock()).lease)
    async with asyncio.timeout(DEADLINE_S):
        await candidate.ended.wait()


async def test_an_error_in_the_body_is_raised_and_resigns(store: Store, root: str) -> None:
    with pytest.raises(ExceptionGroup) as failure:
        async with hold_lock(store, root + "leader", b"one"):
            raise ValueError("of the body")
    assert isinstance(failure.value.exceptions[0], ValueError)
    assert await store.get(root + "leader") is None


async def test_a_leader_without_the_store_stops_by_itself(tmp_path: Path) -> None:
    ttl_s = 2
    async with running(tmp_path / "etcd") as etcd:
        store = EtcdStore([etcd.endpoint], timeout_s=0.5)
        candidate = Candidate(store, "/leader", b"one", ttl_s)
        await candidate.holds_lock()
        etcd.kill()
        async with asyncio.timeout(DEADLINE_S):
            await candidate.ended.wait()
        with pytest.raises(StoreUnavailableError):
            await store.get("/leader")
        await store.close()
