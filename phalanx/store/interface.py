"""The `Store` protocol: keys, transactions, leases and watches, as etcd defines them.

`phalanx.store.etcd` and `phalanx.store.memory` implement it and pass one contract suite
(tests/store/test_contract.py). Keys are text, values are bytes. Each write gets a revision that is
higher than every earlier one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class StoreError(Exception):
    """The store failed, or a call was invalid."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached now. A write that raises this may have been applied."""


class LeaseLostError(StoreError):
    """The lease has expired or was revoked, and every key under it is deleted."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A value, and the revisions at which its key was created and last written."""

    value: bytes
    create_revision: int
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All keys under a prefix at one revision."""

    revision: int
    entries: Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Change:
    """A listing, and its difference from the listing before it; `None` marks a deleted key.

    `changed` includes a key that was rewritten with the same value: its `mod_revision` differs.
    """

    listing: Listing
    changed: Mapping[str, Entry | None]


@dataclass(frozen=True, slots=True)
class Created:
    """True when the key was created at `revision`; 0 means that the key does not exist."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Modified:
    """True when the key was last written at `revision`; 0 means that the key does not exist."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Put:
    """Write a value. With a lease, the key is deleted when the lease ends."""

    key: str
    value: bytes
    lease: int | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key. Does nothing when the key does not exist."""

    key: str


Condition = Created | Modified
Operation = Put | Delete


class Store(Protocol):
    """Every method but `watch` and `close` raises StoreUnavailableError when the store cannot be reached."""

    async def get(self, key: str) -> Entry | None:
        """The entry at a key, or None when the key does not exist."""
        ...

    async def list(self, prefix: str) -> Listing:
        """Every entry under a prefix."""
        ...

    async def txn(self, when: Sequence[Condition], then: Sequence[Operation]) -> int | None:
        """Apply all of `then` if every condition in `when` is true; returns the revision, else None.

        Raises:
            LeaseLostError: a `Put` names a lease that has ended; nothing was written.
        """
        ...

    def watch(self, prefix: str) -> AsyncGenerator[Change, None]:
        """Yields the current listing, with every entry in `changed`, then each change. Never ends.

        Several changes may come as one, but none is lost.

        A broken connection resumes after the last revision. After a compaction the watch lists again
        and yields the difference. While the store is unreachable the watch yields nothing. Close the
        generator (`contextlib.aclosing`) to stop watching before the task ends.
        """
        ...

    async def grant(self, ttl_s: int) -> int:
        """Create a lease; returns its id. The lease ends `ttl_s` seconds after its last refresh."""
        ...

    async def refresh(self, lease: int) -> float:
        """Renew a lease; returns its new time to live in seconds. Raises LeaseLostError when it has ended."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and delete every key under it. Does nothing when the lease has ended."""
        ...

    async def close(self) -> None:
        """Release connections. Leases stay until they expire."""
        ...
