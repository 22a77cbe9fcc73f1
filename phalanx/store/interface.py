"""The store that the cluster's truth lives in, as a protocol.

Two implementations pass one contract suite: `phalanx.store.etcd` and `phalanx.store.memory`. Keys are
text, values are bytes. Every write has a revision that grows by at least one.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class StoreError(Exception):
    """Something is wrong with the store or with how it was used."""


class StoreUnavailableError(StoreError):
    """The store cannot be reached now; a write may or may not have happened."""


class LeaseLostError(StoreError):
    """The lease has expired or was revoked: everything under it is gone."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A value with the revisions at which its key was created and last written."""

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
    """A listing and what differs from the one before it; `None` marks a deleted key.

    Keys rewritten with the same value count as changed too, since their `mod_revision` moved.
    """

    listing: Listing
    changed: Mapping[str, Entry | None]


@dataclass(frozen=True, slots=True)
class Created:
    """Holds when the key was created at `revision`; 0 means that it does not exist."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Modified:
    """Holds when the key was last written at `revision`; 0 means that it does not exist."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Put:
    """Write a value, under a lease where one is given."""

    key: str
    value: bytes
    lease: int | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a key; nothing happens when it does not exist."""

    key: str


Condition = Created | Modified
Operation = Put | Delete


class Store(Protocol):
    """Every method raises StoreUnavailableError when the store cannot be reached."""

    async def get(self, key: str) -> Entry | None:
        """The entry at a key."""
        ...

    async def list(self, prefix: str) -> Listing:
        """Every entry under a prefix."""
        ...

    async def txn(self, when: Sequence[Condition], then: Sequence[Operation]) -> int | None:
        """Do all of `then` if all of `when` holds: the revision, or None when it does not hold."""
        ...

    def watch(self, prefix: str) -> AsyncGenerator[Change, None]:
        """The listing now (every entry in `changed`), then each change, without end and without gaps.

        Survives broken connections (resumes after the last revision) and compaction (lists again and
        yields the difference). While the store is away it yields nothing: what was known stays known.
        Close it (`contextlib.aclosing`) when leaving before the task ends.
        """
        ...

    async def grant(self, ttl_s: int) -> int:
        """A new lease's id. The lease ends `ttl_s` seconds after its last refresh."""
        ...

    async def refresh(self, lease: int) -> float:
        """Renew a lease; returns its new time to live in seconds. Raises LeaseLostError."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and delete every key under it; nothing happens when it has ended."""
        ...

    async def close(self) -> None:
        """Release connections. Leases are left to expire."""
        ...


_BACK_OFF_FIRST_S, _BACK_OFF_CAP_S = 0.1, 1.0


def back_off(failures: int) -> float:
    """Seconds before the next try after `failures`: with full jitter, so that not all return together."""
    return random.uniform(0, min(_BACK_OFF_CAP_S, _BACK_OFF_FIRST_S * 2.0 ** min(failures - 1, 10)))
