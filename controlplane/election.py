"""Election of the active controller: the one that holds the lock.

The lock is a key that a controller creates under a lease. The lease alone is no mutual exclusion: a
paused controller may wake up after its lease has ended. `controlplane.fencing` guarantees that its writes
then fail. The deadline in this file makes a running controller stop before its lease can end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from controlplane.fencing import Lock
from phalanx.store.backoff import back_off
from phalanx.store.interface import Created, LeaseLostError, Put, Store, StoreUnavailableError

log = logging.getLogger(__name__)

_REFRESHES_PER_TTL = 4
# Stop when this fraction of the time to live is left: the clocks of controller and store may differ in speed.
_MARGIN = 0.1


@contextlib.asynccontextmanager
async def hold_lock(store: Store, key: str, value: bytes, ttl_s: int = 3) -> AsyncIterator[Lock]:
    """Wait until this controller holds the lock, hold it within the context, release it on exit.

    The lock is lost when the lease has ended, or may end soon because it could not be refreshed. Then the
    body is cancelled at its current await, and the context ends without an error. So the body should run
    until that moment.
    """
    lock, deadline = await _acquire(store, key, value, ttl_s)
    log.info("lock acquired", extra={"fence": lock.fence})
    try:
        async with asyncio.timeout_at(deadline) as term:
            async with asyncio.TaskGroup() as tasks:
                refresher = tasks.create_task(_keep_refreshed(store, lock.lease, ttl_s, term))
                yield lock
                refresher.cancel()
    except TimeoutError:  # from `term`: an error of the body arrives inside an ExceptionGroup
        log.warning("lock lost", extra={"fence": lock.fence})
    finally:
        await _release(store, lock.lease)


async def _acquire(store: Store, key: str, value: bytes, ttl_s: int) -> tuple[Lock, float]:
    """Create the lock once it is free; returns it and its first deadline in event loop time."""
    loop, failures = asyncio.get_running_loop(), 0
    while True:
        try:
            async with contextlib.aclosing(store.watch(key)) as changes:
                async for change in changes:
                    if key in change.listing.entries:
                        continue
                    asked_at = loop.time()
                    lease = await store.grant(ttl_s)
                    fence = await store.txn([Created(key, 0)], [Put(key, value, lease)])
                    if fence is not None:
                        return Lock(key, value, lease, fence), asked_at + ttl_s * (1 - _MARGIN)
                    await store.revoke(lease)
        except (StoreUnavailableError, LeaseLostError) as error:
            # The lease, and the key if the failed call created it after all, expire without help.
            failures += 1
            log.warning("election waits for the store", extra={"reason": str(error)})
            await asyncio.sleep(back_off(failures))


async def _keep_refreshed(store: Store, lease: int, ttl_s: int, term: asyncio.Timeout) -> None:
    """Refresh the lease, and move the deadline of `term` with each success."""
    loop, failures = asyncio.get_running_loop(), 0
    wait_s = ttl_s / _REFRESHES_PER_TTL
    while not term.expired():
        await asyncio.sleep(wait_s)
        asked_at = loop.time()
        try:
            left_s = await store.refresh(lease)
        except LeaseLostError:
            deadline: float = asked_at  # now in the past: `term` expires at once
        except StoreUnavailableError as error:
            failures += 1
            wait_s = back_off(failures)
            log.warning("lease not refreshed", extra={"reason": str(error)})
            continue
        else:
            deadline = asked_at + left_s * (1 - _MARGIN)
        wait_s, failures = ttl_s / _REFRESHES_PER_TTL, 0
        if not term.expired():
            term.reschedule(deadline)


async def _release(store: Store, lease: int) -> None:
    """Revoke the lease, so that the next controller takes over now; without the store it expires."""
    with contextlib.suppress(StoreUnavailableError):
        await store.revoke(lease)
