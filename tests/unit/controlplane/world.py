"""A cluster in a MemoryStore with a virtual clock, moved by hand: no event loop, no time."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from controlplane.actions import Leadership, guarded, transactions
from controlplane.reconcile import Decision, Memory, reconcile
from phalanx.store.interface import Created, Delete, Listing, Put
from phalanx.store.keys import Keys
from phalanx.store.memory import MemoryStore
from phalanx.store.records import (
    ControllerRecord,
    DeploymentRecord,
    LayoutRecord,
    Record,
    ShardRecord,
    ShardState,
    WorkerRecord,
    encode,
)
from phalanx.store.snapshot import Snapshot

T = TypeVar("T")


def instantly(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits, as those of a MemoryStore with its own clock."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("the coroutine waits")


class World:
    def __init__(self) -> None:
        self.now = 1_000.0
        self.keys = Keys()
        self.store = MemoryStore(clock=lambda: self.now)
        self._boots = 0
        self.memory = Memory()
        value = encode(ControllerRecord("controller-0", "127.0.0.1:1"))
        lease = instantly(self.store.grant(10**9))
        key = self.keys.controller_lock
        fence = instantly(self.store.txn([Created(key, 0)], [Put(key, value, lease)]))
        assert fence is not None
        self.leadership = Leadership(key, value, lease, fence)

    @property
    def listing(self) -> Listing:
        return instantly(self.store.list(self.keys.root))

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot.of(self.listing, self.keys)

    def put(self, key: str, record: Record) -> int:
        revision = instantly(self.store.txn([], [Put(key, encode(record))]))
        assert revision is not None
        return revision

    def boot(
        self, *workers: str, host: str = "host-0", draining: bool = False, memory_bytes: int = 0
    ) -> None:
        for worker in workers:
            self._boots += 1
            record = WorkerRecord(
                worker, f"boot-{self._boots}", host, f"{worker}:1", "cpu", self._boots, draining, memory_bytes
            )
            self.put(self.keys.worker(worker), record)

    def die(self, worker: str) -> None:
        """The worker's lease ends: its registration and its shards' statuses vanish."""
        gone = [
            self.keys.shard(*place) for place, shard in self.snapshot.shards.items() if shard.worker == worker
        ]
        instantly(self.store.txn([], [Delete(key) for key in (self.keys.worker(worker), *gone)]))

    def apply(
        self,
        name: str,
        replicas: int = 1,
        tp: int = 1,
        pp: int = 1,
        model: str = "/models/one",
        fallbacks: tuple[LayoutRecord, ...] = (),
    ) -> None:
        old = self.snapshot.deployments.get(name)
        revision = old.revision + 1 if old else 1
        record = DeploymentRecord(name, revision, model, replicas, tp, pp, fallbacks=fallbacks)
        self.put(self.keys.deployment(name), record)

    def delete(self, name: str) -> None:
        instantly(self.store.txn([], [Delete(self.keys.deployment(name))]))

    def report(
        self,
        replica: str,
        state: ShardState,
        *ranks: int,
        reason: str = "",
        permanent: bool = False,
    ) -> None:
        """The shards (all when no ranks are given) of the current epoch say how they are, if alive."""
        snapshot = self.snapshot
        assigned = snapshot.replicas[replica]
        for rank in ranks or range(len(assigned.assignment.members)):
            member = assigned.assignment.members[rank]
            worker = snapshot.workers.get(member.worker)
            if worker and worker.incarnation == member.incarnation:
                shard = ShardRecord(
                    replica,
                    rank,
                    assigned.epoch,
                    member.worker,
                    member.incarnation,
                    state,
                    reason,
                    permanent,
                )
                self.put(self.keys.shard(replica, rank), shard)

    def ready(self, *replicas: str) -> None:
        for replica in replicas:
            self.report(replica, ShardState.READY)

    def fail(self, replica: str, *ranks: int, reason: str = "killed", permanent: bool = False) -> None:
        self.report(replica, ShardState.FAILED, *ranks, reason=reason, permanent=permanent)

    def reconcile(self, listing: Listing | None = None) -> tuple[Decision, bool]:
        """Decide on a listing (now's by default) and write; returns whether all of it was written."""
        listing = listing or self.listing
        decision = reconcile(Snapshot.of(listing, self.keys), self.now, self.memory)
        self.memory = decision.memory
        modified: int | None = listing.entries[self.keys.controller_lock].mod_revision
        for group in transactions(decision.actions):
            if modified is not None:
                txn = self.store.txn(*guarded(group, self.keys, self.leadership, modified))
                modified = instantly(txn)
        return decision, modified is not None

    def settle(self) -> Decision:
        """Reconcile and check that nothing is left to do at this time."""
        decision, written = self.reconcile()
        assert written
        again = reconcile(self.snapshot, self.now, self.memory)
        assert again.actions == ()
        return decision

    def members(self, replica: str) -> list[str]:
        return [member.worker for member in self.snapshot.replicas[replica].assignment.members]
