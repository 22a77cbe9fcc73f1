"""What the leading controller does: decide whenever something changes, and write what was decided."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from controlplane.actions import Leadership, guarded, transactions
from controlplane.election import lead
from controlplane.reconcile import Action, Form, Memory, Remove, reconcile
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
    """Campaign, lead until the leadership is lost, and again, without end."""
    while True:
        async with lead(store, keys.controller_lock, encode(record), ttl_s) as leadership:
            await _rule(store, keys, view, leadership, clock)


async def _rule(
    store: Store, keys: Keys, view: View, leadership: Leadership, clock: Callable[[], float]
) -> None:
    """Reconcile on each change and when time brings one; returns when another controller leads."""
    failures = 0
    memory = Memory()
    while True:
        listing, snapshot, now = view.listing, view.snapshot, clock()
        wait_s: float | None = None
        if listing is not None and listing.revision >= leadership.fence:
            held = listing.entries.get(keys.controller_lock)
            if held is None or held.create_revision != leadership.fence:
                log.warning("another controller leads", extra={"fence": leadership.fence})
                return
            decision = reconcile(snapshot, now, memory)
            memory = decision.memory
            if decision.wake_at is not None:
                wait_s = max(0.0, decision.wake_at - now)
            try:
                await _carry_out(decision.actions, store, keys, leadership, held.mod_revision)
                failures = 0
            except StoreUnavailableError as error:
                failures += 1
                wait_s = back_off(failures)
                log.warning("not written", extra={"reason": str(error)})
            except LeaseLostError as error:
                log.warning("lease lost", extra={"reason": str(error)})
                return
        await _newer(view, listing, wait_s)


async def _newer(view: View, listing: Listing | None, wait_s: float | None) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await view.newer(listing)


async def _carry_out(
    actions: tuple[Action, ...], store: Store, keys: Keys, leadership: Leadership, modified: int
) -> None:
    """Write the actions, as far as the view that they come from is the latest."""
    for group in transactions(actions):
        revision = await store.txn(*guarded(group, keys, leadership, modified))
        if revision is None:
            log.debug("view lags behind; the next one decides again")
            return
        modified = revision
        for action in group:
            _log(action, revision)


def _log(action: Action, revision: int) -> None:
    match action:
        case Form(assignment, _):
            extra: dict[str, object] = {
                "replica": assignment.replica,
                "epoch": revision,
                "members": [member.worker for member in assignment.members],
                "tp": assignment.deployment.tp,
                "pp": assignment.deployment.pp,
                "failures": assignment.failures,
            }
            log.info("replica formed", extra=extra)
        case Remove(replica, epoch):
            log.info("replica removed", extra={"replica": replica, "epoch": epoch})
        case _:
            log.debug("noted", extra={"action": repr(action)})
