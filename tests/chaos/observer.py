"""Watches the replicas' state in the store, and records when each change arrived."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from phalanx.store.etcd import EtcdStore
from phalanx.store.keys import Keys
from phalanx.store.records import ShardRecord, ShardState
from phalanx.store.snapshot import Snapshot


@dataclass(slots=True)
class Observer:
    """Follows the store of one cluster, as any process of the cluster does. It writes nothing."""

    store: EtcdStore
    keys: Keys = field(default_factory=Keys)
    snapshot: Snapshot = field(default_factory=Snapshot)
    failed: dict[tuple[str, int], tuple[float, str]] = field(default_factory=dict)  # by replica and epoch
    ready: dict[tuple[str, int], float] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Follow until cancelled."""
        async for change in self.store.watch(self.keys.root):
            now = time.monotonic()
            self.snapshot = Snapshot.of(change.listing, self.keys)
            for shard in self.snapshot.shards.values():
                if shard.state is ShardState.FAILED:
                    self.failed.setdefault((shard.replica, shard.epoch), (now, shard.reason))
            for name, assigned in self.snapshot.replicas.items():
                if self.is_ready(name):
                    self.ready.setdefault((name, assigned.epoch), now)
                elif (name, assigned.epoch) in self.ready:
                    self.failed.setdefault((name, assigned.epoch), (now, "a shard's status is gone"))
                # A new epoch without a FAILED status before it means that the fault was noticed, too.
                for replica, epoch in list(self.ready):
                    if replica == name and epoch < assigned.epoch:
                        self.failed.setdefault((name, epoch), (now, "formed anew"))
            self._news.set()

    def shards(self, replica: str) -> list[ShardRecord]:
        """The shards of a replica's current epoch that have written a status, in order of rank."""
        assigned = self.snapshot.replicas[replica]
        found = [self.snapshot.shard(replica, rank) for rank in range(len(assigned.assignment.members))]
        return [shard for shard in found if shard is not None]

    def is_ready(self, replica: str) -> bool:
        """Whether every shard of a replica's current epoch is ready."""
        members = self.snapshot.replicas[replica].assignment.members
        shards = self.shards(replica)
        return len(shards) == len(members) and all(shard.state is ShardState.READY for shard in shards)

    async def until(self, condition: Callable[[], bool], within_s: float) -> None:
        """Return once `condition` holds; it is tested after each change. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while not condition():
                self._news.clear()
                await self._news.wait()
