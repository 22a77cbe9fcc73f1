"""When a controller that cannot refresh its lease stops, in simulated time."""

from __future__ import annotations

import asyncio

from controlplane.election import hold_lock
from phalanx.store.interface import StoreUnavailableError
from phalanx.store.memory import MemoryStore
from tests.sim.loop import SimLoop

TTL_S = 10
ANSWER_S = 1.0


class SlowStore(MemoryStore):
    """Answers lease calls after `ANSWER_S`; fails every refresh that is asked for after `fails_from`."""

    def __init__(self, loop: SimLoop, fails_from: float) -> None:
        super().__init__(clock=loop.time)
        self.loop, self.fails_from = loop, fails_from
        self.refreshed_at: list[float] = []

    async def grant(self, ttl_s: int) -> int:
        self.refreshed_at.append(self.loop.time())
        lease = await super().grant(ttl_s)
        await asyncio.sleep(ANSWER_S)
        return lease

    async def refresh(self, lease: int) -> float:
        asked_at = self.loop.time()
        if asked_at >= self.fails_from:
            raise StoreUnavailableError("away")
        left_s = await super().refresh(lease)
        self.refreshed_at.append(asked_at)
        await asyncio.sleep(ANSWER_S)
        return left_s


def held_until(fails_after_s: float) -> tuple[float, SlowStore]:
    """When the body of `hold_lock` was cancelled, and the store."""
    loop = SimLoop()
    store = SlowStore(loop, loop.time() + fails_after_s)

    async def hold() -> float:
        async with hold_lock(store, "/lock", b"one", TTL_S):
            try:
                await asyncio.Event().wait()
            finally:
                ended_at = loop.time()
        return ended_at

    try:
        return loop.run_until_complete(hold()), store
    finally:
        loop.bury()


def test_a_controller_that_cannot_refresh_stops_before_its_lease_can_end() -> None:
    """The lease counts from when it was asked for: the store may have granted it at once."""
    ended_at, store = held_until(fails_after_s=0.0)
    assert ended_at == store.refreshed_at[0] + 0.9 * TTL_S


def test_each_refresh_moves_the_deadline() -> None:
    ended_at, store = held_until(fails_after_s=100.0)
    assert ended_at == store.refreshed_at[-1] + 0.9 * TTL_S
    assert len(store.refreshed_at) > 25, "several refreshes within each time to live"
