"""The loop of the active controller: reconcile whenever the cluster changes, and write the actions.

Owns: when to reconcile, retries. Does not own: the decisions (`controlplane.decisions`), the lock
(`controlplane.election`), the conditions of each write (`controlplane.fencing`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from controlplane.decisions.actions import Action, FormReplica, RemoveReplica
from controlplane.decisions.cycle import History
from controlplane.decisions.reconcile import reconcile
from controlplane.election import hold_lock
from controlplane.fencing import Lock, batches, fenced
from controlplane.view import View
from phalanx.store.backoff import back_off
from phalanx.store.interface import LeaseLostError, Listing, Store, StoreUnavailableError
from phalanx.store.keys import Keys
from phalanx.store.records import ControllerRecord, encode

log = logging.getLogger(__name__)


async def run(
    store: Store,
    keys: Keys,
    view: View,
    record: ControllerRecord,
    *,
    ttl_s: int = 3,
    clock: Callable[[], float] = time.time,
) -> None:
    """Wait for the lock, be the active controller until it is lost, repeat. Never returns."""
    while True:
        async with hold_lock(store, keys.controller_lock, encode(record), ttl_s) as lock:
            await reconcile_until_fenced(store, keys, view, lock, clock)


async def reconcile_until_fenced(
    store: Store, keys: Keys, view: View, lock: Lock, clock: Callable[[], float]
) -> None:
    """Reconcile on each change and at each `wake_at`; returns once another controller holds the lock."""
    failures = 0
    history = History()
    while True:
        listing, snapshot, now = view.listing, view.snapshot, clock()
        wait_s: float | None = None
        # Skip a listing from before this controller took the lock: it shows the previous holder.
        if listing is not None and listing.revision >= lock.fence:
            current = listing.entries.get(lock.key)
            if current is None or current.create_revision != lock.fence:
                log.warning("another controller holds the lock", extra={"fence": lock.fence})
                return
            decision = reconcile(snapshot, now, history)
            history = decision.history
            if decision.wake_at is not None:
                wait_s = max(0.0, decision.wake_at - now)
            try:
                await _write(decision.actions, store, keys, lock, current.mod_revision)
                failures = 0
            except StoreUnavailableError as error:
                failures += 1
                wait_s = back_off(failures)
                log.warning("not written", extra={"reason": str(error)})
            except LeaseLostError as error:
                log.warning("lease lost", extra={"reason": str(error)})
                return
        await _wait_for_change(view, listing, wait_s)


async def _wait_for_change(view: View, listing: Listing | None, wait_s: float | None) -> None:
    """Wait until the view has a newer listing, at most `wait_s` seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await view.newer(listing)


async def _write(actions: tuple[Action, ...], store: Store, keys: Keys, lock: Lock, modified: int) -> None:
    """Write the actions batch by batch; stop at the first batch that the store refuses."""
    for batch in batches(actions):
        revision = await store.txn(*fenced(batch, keys, lock, modified))
        if revision is None:
            log.debug("refused: the view lags behind; the next view brings a new decision")
            return
        modified = revision
        for action in batch:
            _log(action, revision)


def _log(action: Action, revision: int) -> None:
    match action:
        case FormReplica(assignment, _):
            extra: dict[str, object] = {
                "replica": assignment.replica,
                "epoch": revision,
                "members": [member.worker for member in assignment.members],
                "tp": assignment.deployment.tp,
                "pp": assignment.deployment.pp,
                "failures": assignment.failures,
            }
            log.info("replica formed", extra=extra)
        case RemoveReplica(replica, epoch):
            log.info("replica removed", extra={"replica": replica, "epoch": epoch})
        case _:
            log.debug("written", extra={"action": repr(action)})
