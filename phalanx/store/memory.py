"""The store in this process's memory, for tests and the simulation."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from phalanx.store.interface import (
    Change,
    Condition,
    Created,
    Delete,
    Entry,
    LeaseLostError,
    Listing,
    Operation,
    Put,
    StoreError,
)


@dataclass(slots=True)
class _Lease:
    ttl_s: int
    expires_at: float
    keys: set[str] = field(default_factory=set)


class MemoryStore:
    """A `Store` within one event loop.

    Owns: entries, leases and their expiry, one queue per watch.
    Does not own: durability, access from other processes, compaction (a watch's queue is unbounded).

    Leases expire by `clock`. With the default clock a timer expires them. With another clock, `expire`
    or the next call does.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._revision = 1  # as in a fresh etcd
        self._entries: dict[str, Entry] = {}
        self._leases: dict[int, _Lease] = {}
        self._lease_of: dict[str, int] = {}
        self._lease_ids = itertools.count(1)
        self._watchers: dict[asyncio.Queue[Change], str] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def get(self, key: str) -> Entry | None:
        """See `Store.get`."""
        self.expire()
        return self._entries.get(key)

    async def list(self, prefix: str) -> Listing:
        """See `Store.list`."""
        self.expire()
        return self._listing(prefix)

    async def txn(self, when: Sequence[Condition], then: Sequence[Operation]) -> int | None:
        """See `Store.txn`."""
        self.expire()
        _check_keys(then)
        if not all(self._is_true(condition) for condition in when):
            return None
        for operation in then:
            if isinstance(operation, Put) and operation.lease is not None:
                self._live_lease(operation.lease)
        self._apply(then)
        return self._revision

    async def watch(self, prefix: str) -> AsyncGenerator[Change, None]:
        """See `Store.watch`."""
        self.expire()
        queue: asyncio.Queue[Change] = asyncio.Queue()
        listing = self._listing(prefix)
        queue.put_nowait(Change(listing, listing.entries))
        self._watchers[queue] = prefix
        try:
            while True:
                yield await queue.get()
        finally:
            del self._watchers[queue]

    async def grant(self, ttl_s: int) -> int:
        """See `Store.grant`."""
        self.expire()
        lease = next(self._lease_ids)
        self._leases[lease] = _Lease(ttl_s, self._clock() + ttl_s)
        self._set_timer()
        return lease

    async def refresh(self, lease: int) -> float:
        """See `Store.refresh`."""
        self.expire()
        live = self._live_lease(lease)
        live.expires_at = self._clock() + live.ttl_s
        self._set_timer()
        return float(live.ttl_s)

    async def revoke(self, lease: int) -> None:
        """See `Store.revoke`."""
        self.expire()
        if lease in self._leases:
            self._end(lease)

    async def close(self) -> None:
        """See `Store.close`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expire(self) -> None:
        """End every lease whose time to live is over."""
        now = self._clock()
        for lease in [lease for lease, live in self._leases.items() if live.expires_at <= now]:
            self._end(lease)

    def _is_true(self, condition: Condition) -> bool:
        entry = self._entries.get(condition.key)
        if entry is None:
            return condition.revision == 0
        actual = entry.create_revision if isinstance(condition, Created) else entry.mod_revision
        return actual == condition.revision

    def _live_lease(self, lease: int) -> _Lease:
        live = self._leases.get(lease)
        if live is None:
            raise LeaseLostError(f"lease {lease} has ended")
        return live

    def _end(self, lease: int) -> None:
        self._apply([Delete(key) for key in sorted(self._leases[lease].keys)])
        del self._leases[lease]

    def _apply(self, operations: Sequence[Operation]) -> None:
        revision = self._revision + 1
        changed: dict[str, Entry | None] = {}
        for operation in operations:
            key = operation.key
            old = self._entries.get(key)
            if isinstance(operation, Put):
                created = old.create_revision if old else revision
                self._entries[key] = changed[key] = Entry(operation.value, created, revision)
                self._attach(key, operation.lease)
            elif old is not None:
                del self._entries[key]
                changed[key] = None
                self._attach(key, None)
        if changed:
            self._revision = revision
            self._publish(changed)

    def _attach(self, key: str, lease: int | None) -> None:
        before = self._lease_of.pop(key, None)
        if before is not None:
            self._leases[before].keys.discard(key)
        if lease is not None:
            self._lease_of[key] = lease
            self._leases[lease].keys.add(key)

    def _publish(self, changed: Mapping[str, Entry | None]) -> None:
        for queue, prefix in self._watchers.items():
            matching = {key: entry for key, entry in changed.items() if key.startswith(prefix)}
            if matching:
                queue.put_nowait(Change(self._listing(prefix), MappingProxyType(matching)))

    def _listing(self, prefix: str) -> Listing:
        entries = {key: self._entries[key] for key in sorted(self._entries) if key.startswith(prefix)}
        return Listing(self._revision, MappingProxyType(entries))

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._leases and self._clock is time.monotonic:
            next_end = min(live.expires_at for live in self._leases.values())
            delay_s = max(0.0, next_end - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self.expire()
        self._set_timer()


def _check_keys(operations: Sequence[Operation]) -> None:
    """Refuse, as etcd does, a transaction that writes one key twice."""
    puts = [operation.key for operation in operations if isinstance(operation, Put)]
    deletes = {operation.key for operation in operations if isinstance(operation, Delete)}
    if len(set(puts)) < len(puts) or deletes.intersection(puts):
        raise StoreError("a transaction writes a key twice")
