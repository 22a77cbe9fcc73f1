"""The cluster as this process last saw it, kept fresh by a watch."""

from __future__ import annotations

import asyncio

from phalanx.store.interface import Listing, Store
from phalanx.store.keys import Keys
from phalanx.store.snapshot import Snapshot


class View:
    """The latest listing of the cluster and its snapshot.

    Owns: following the store. Does not own: decisions, writes. While the store is away the last view
    stays.
    """

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys
        self._changed = asyncio.Condition()
        self._listing: Listing | None = None
        self._snapshot = Snapshot()

    @property
    def listing(self) -> Listing | None:
        """What the store held, or None before it was reached for the first time."""
        return self._listing

    @property
    def snapshot(self) -> Snapshot:
        """The same as records; empty before the store was reached."""
        return self._snapshot

    async def follow(self) -> None:
        """Keep the view fresh, without end."""
        async for change in self._store.watch(self._keys.root):
            async with self._changed:
                self._listing = change.listing
                self._snapshot = Snapshot.of(change.listing, self._keys)
                self._changed.notify_all()

    async def newer(self, than: Listing | None) -> Snapshot:
        """Wait until the listing is another one."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._listing is not than)
            return self._snapshot

    async def reached(self, revision: int) -> Snapshot:
        """Wait until the view includes everything up to `revision`, which wrote under the root."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._snapshot.revision >= revision)
            return self._snapshot
