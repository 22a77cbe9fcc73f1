"""Leader election on both stores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from controlplane.actions import Leadership
from controlplane.election import lead
from phalanx.cli.local.embedded_etcd import running
from phalanx.store.etcd import EtcdStore
from phalanx.store.interface import Created, Put, Store, StoreUnavailableError
from tests.store.conftest import DEADLINE_S, until


class Candidate:
    """Campaigns in a task of its own, and says when it leads and when it does no longer."""

    def __init__(self, store: Store, key: str, name: bytes, ttl_s: int = 2) -> None:
        self.leadership: Leadership | None = None
        self.elected = asyncio.Event()
        self.ended = asyncio.Event()
        self.task = asyncio.create_task(self._run(store, key, name, ttl_s))

    async def _run(self, store: Store, key: str, name: bytes, ttl_s: int) -> None:
        async with lead(store, key, name, ttl_s) as self.leadership:
            self.elected.set()
            await asyncio.Event().wait()
        self.ended.set()

    async def leads(self) -> Leadership:
        async with asyncio.timeout(DEADLINE_S):
            await self.elected.wait()
        assert self.leadership is not None
        return self.leadership

    async def resign(self) -> None:
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
        await candidate.resign()


Start = Callable[[bytes], Candidate]


async def test_the_fence_is_the_keys_create_revision(store: Store, root: str, candidates: Start) -> None:
    leadership = await candidates(b"one").leads()
    entry = await store.get(root + "leader")
    assert entry is not None
    assert (entry.value, entry.create_revision) == (b"one", leadership.fence)


async def test_one_leads_and_the_next_follows_when_it_resigns(
    store: Store, root: str, candidates: Start
) -> None:
    first = candidates(b"one")
    old = await first.leads()
    second = candidates(b"two")
    async with aclosing(store.watch(root)) as changes:
        await anext(changes)
        assert not second.elected.is_set()
        await first.resign()
        seen = await until(changes, lambda change: bool(change.listing.entries))
    new = await second.leads()
    assert seen[-1].listing.entries[root + "leader"].value == b"two"
    assert new.fence > old.fence


async def test_a_former_leader_cannot_write(store: Store, root: str, candidates: Start) -> None:
    first = candidates(b"one")
    old = await first.leads()
    await first.resign()
    await candidates(b"two").leads()
    assert await store.txn([Created(old.key, old.fence)], [Put(root + "written", b"")]) is None


async def test_a_leader_that_does_nothing_stays(store: Store, root: str, candidates: Start) -> None:
    """Its lease is refreshed: another lease of the same length, granted later, ends before."""
    candidate = candidates(b"one")
    await candidate.leads()
    lease = await store.grant(2)
    await store.txn([], [Put(root + "clock", b"", lease)])
    async with aclosing(store.watch(root)) as changes:
        await until(changes, lambda change: root + "clock" not in change.listing.entries)
    assert not candidate.ended.is_set()
    assert await store.get(root + "leader") is not None


async def test_a_leader_whose_lease_ended_stops(store: Store, candidates: Start) -> None:
    candidate = candidates(b"one")
    await store.revoke((await candidate.leads()).lease)
    async with asyncio.timeout(DEADLINE_S):
        await candidate.ended.wait()


async def test_an_error_in_the_body_is_raised_and_resigns(store: Store, root: str) -> None:
    with pytest.raises(ExceptionGroup) as failure:
        async with lead(store, root + "leader", b"one"):
            raise ValueError("of the body")
    assert isinstance(failure.value.exceptions[0], ValueError)
    assert await store.get(root + "leader") is None


async def test_a_leader_without_the_store_stops_by_itself(tmp_path: Path) -> None:
    ttl_s = 2
    async with running(tmp_path / "etcd") as etcd:
        store = EtcdStore([etcd.endpoint], timeout_s=0.5)
        candidate = Candidate(store, "/leader", b"one", ttl_s)
        await candidate.leads()
        etcd.kill()
        async with asyncio.timeout(DEADLINE_S):
            await candidate.ended.wait()
        with pytest.raises(StoreUnavailableError):
            await store.get("/leader")
        await store.close()
