"""The loop of an active controller after another controller has taken the lock."""

from __future__ import annotations

import asyncio

import pytest

from controlplane.active_controller import reconcile_until_fenced
from controlplane.fencing import Lock
from controlplane.view import View
from phalanx.store.interface import Created, Delete, Put
from phalanx.store.memory import MemoryStore
from phalanx.store.snapshot import Snapshot
from tests.unit.controlplane.world import World, instantly


@pytest.fixture
def world() -> World:
    return World()


async def taken_over(store: MemoryStore, former: Lock) -> int:
    """Let another controller take the lock while the former one's lease lives; returns its fence."""
    await store.txn([], [Delete(former.key)])
    fence = await store.txn([Created(former.key, 0)], [Put(former.key, b"another")])
    assert fence is not None
    return fence


async def test_a_former_controller_stops_and_writes_nothing(world: World) -> None:
    world.boot("w0")
    world.apply("a")
    fence = await taken_over(world.store, world.lock)
    view = View(world.store, world.keys)
    following = asyncio.create_task(view.follow())
    async with asyncio.timeout(5):
        await reconcile_until_fenced(world.store, world.keys, view, world.lock, lambda: world.now)
    following.cancel()
    await asyncio.wait([following])
    assert not world.snapshot.replicas
    assert world.listing.entries[world.lock.key].mod_revision == fence


def test_a_former_controller_cannot_write_even_if_its_view_shows_the_new_lock(world: World) -> None:
    """`World.reconcile` compares the lock's newest mod_revision: the fencing token alone is old."""
    world.boot("w0")
    world.apply("a")
    instantly(taken_over(world.store, world.lock))
    decision, written = world.reconcile()
    assert decision.actions
    assert not written
    assert not Snapshot.of(world.listing, world.keys).replicas
