"""A cluster in a MemoryStore with a virtual clock, moved by hand: no event loop, no time."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from controlplane.decisions.actions import FormReplica
from controlplane.decisions.cycle import History
from controlplane.decisions.degrade import DEGRADE_AFTER_S
from controlplane.decisions.reconcile import Decision, reconcile
from controlplane.fencing import Lock, batches, fenced
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
FALLBACKS = (LayoutRecord(2, 1, 10 << 20), LayoutRecord(1, 2, 10 << 20), LayoutRecord(1, 1, 20 << 20))


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
        self.history = History()
        value = encode(ControllerRecord("controller-0", "127.0.0.1:1"))
        lease = instantly(self.store.grant(10**9))
        key = self.keys.controller_lock
        fence = instantly(self.store.txn([Created(key, 0)], [Put(key, value, lease)]))
        assert fence is not None
        self.lock = Lock(key, value, lease, fence)

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
        """Write a state for the shards of the current epoch, all or some; only live workers report."""
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
        """Decide on a listing (default: the current one) and write; also returns whether all was written."""
        listing = listing or self.listing
        decision = reconcile(Snapshot.of(listing, self.keys), self.now, self.history)
        self.history = decision.history
        modified: int | None = listing.entries[self.keys.controller_lock].mod_revision
        for batch in batches(decision.actions):
            if modified is not None:
                txn = self.store.txn(*fenced(batch, self.keys, self.lock, modified))
                modified = instantly(txn)
        return decision, modified is not None

    def settle(self) -> Decision:
        """Reconcile, and check that a second decision at the same time has no actions."""
        decision, written = self.reconcile()
        assert written
        again = reconcile(self.snapshot, self.now, self.history)
        assert again.actions == ()
        return decision

    def members(self, replica: str) -> list[str]:
        return [member.worker for member in self.snapshot.replicas[replica].assignment.members]

    def formed(self) -> list[str]:
        """Settle; the replicas that were formed."""
        actions = self.settle().actions
        return [action.assignment.replica for action in actions if isinstance(action, FormReplica)]

    def serve(
        self,
        name: str,
        replicas: int,
        tp: int = 1,
        pp: int = 1,
        fallbacks: tuple[LayoutRecord, ...] = (),
    ) -> None:
        """Apply a deployment and let its replicas become ready."""
        self.apply(name, replicas, tp, pp, fallbacks=fallbacks)
        self.settle()
        self.ready(*(f"{name}-{index}" for index in range(replicas)))
        self.settle()

    def degrade(self) -> None:
        """Let a replica of four workers lose one for good, and be degraded."""
        self.boot("w0", "w1", "w2", "w3")
        self.serve("a", 1, tp=2, pp=2, fallbacks=FALLBACKS)
        self.die("w1")
        self.settle()
        self.now += DEGRADE_AFTER_S
        assert self.formed() == ["a-0"]

    def layout(self, replica: str = "a-0") -> tuple[int, int]:
        """TP and PP of the replica's current epoch."""
        deployment = self.snapshot.replicas[replica].assignment.deployment
        return deployment.tp, deployment.pp
