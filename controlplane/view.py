"""The cluster as this process last saw it in the store."""

from __future__ import annotations

import asyncio

from phalanx.store.interface import Listing, Store
from phalanx.store.keys import Keys
from phalanx.store.snapshot import Snapshot


class View:
    """The latest listing of the cluster and its snapshot.

    Owns: the watch of the store. Does not own: decisions, writes. While the store does not answer, the last
    listing stays.
    """

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys
        self._changed = asyncio.Condition()
        self._listing: Listing | None = None
        self._snapshot = Snapshot()

    @property
    def listing(self) -> Listing | None:
        """The latest listing; None until the store has answered once."""
        return self._listing

    @property
    def snapshot(self) -> Snapshot:
        """The latest listing as records; empty until the store has answered once."""
        return self._snapshot

    async def follow(self) -> None:
        """Update the view on every change of the store, forever."""
        async for change in self._store.watch(self._keys.root):
            async with self._changed:
                self._listing = change.listing
                self._snapshot = Snapshot.of(change.listing, self._keys)
                self._changed.notify_all()

    async def newer(self, than: Listing | None) -> Snapshot:
        """Wait until the listing is another object than `than`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._listing is not than)
            return self._snapshot

    async def reached(self, revision: int) -> Snapshot:
        """Wait until the view includes `revision`, which must have changed a key of the cluster."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._snapshot.revision >= revision)
            return self._snapshot
