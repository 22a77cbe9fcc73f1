"""Leader election among controllers.

The leader's key is created under a lease; its create_revision is the fence that every write of the
leader compares. A lease alone is no mutual exclusion: the fence is the guarantee, and the leader's own
deadline makes it stop before the lease can end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from controlplane.actions import Leadership
from phalanx.store.backoff import back_off
from phalanx.store.interface import Created, LeaseLostError, Put, Store, StoreUnavailableError

log = logging.getLogger(__name__)

_REFRESHES_PER_TTL = 4
# Stop this part of the time to live before the lease ends: clocks do not run alike.
_MARGIN = 0.1


@contextlib.asynccontextmanager
async def lead(store: Store, key: str, value: bytes, ttl_s: int = 3) -> AsyncIterator[Leadership]:
    """Wait to be elected and lead within the context; on leaving it, resign.

    When the leadership is lost, the body is cancelled where it awaits and the context ends without an
    error; so let the body run until then. Lost means that the lease may end soon as far as this process
    can know, or has ended.
    """
    leadership, deadline = await _campaign(store, key, value, ttl_s)
    log.info("leading", extra={"fence": leadership.fence})
    try:
        async with asyncio.timeout_at(deadline) as term:
            async with asyncio.TaskGroup() as tasks:
                keeper = tasks.create_task(_keep(store, leadership.lease, ttl_s, term))
                yield leadership
                keeper.cancel()
    except TimeoutError:  # the term's: what the body raises comes in an ExceptionGroup
        log.warning("leadership lost", extra={"fence": leadership.fence})
    finally:
        await _resign(store, leadership.lease)


async def _campaign(store: Store, key: str, value: bytes, ttl_s: int) -> tuple[Leadership, float]:
    """The leadership, and the time of the event loop until which it holds."""
    loop, failures = asyncio.get_running_loop(), 0
    while True:
        try:
            async with contextlib.aclosing(store.watch(key)) as changes:
                async for change in changes:
                    if key in change.listing.entries:
                        continue
                    asked = loop.time()
                    lease = await store.grant(ttl_s)
                    fence = await store.txn([Created(key, 0)], [Put(key, value, lease)])
                    if fence is not None:
                        return Leadership(key, value, lease, fence), asked + ttl_s * (1 - _MARGIN)
                    await store.revoke(lease)
        except (StoreUnavailableError, LeaseLostError) as error:
            # A lease that was granted, and a key that was created all the same, end by themselves.
            failures += 1
            log.warning("election waits for the store", extra={"reason": str(error)})
            await asyncio.sleep(back_off(failures))


async def _keep(store: Store, lease: int, ttl_s: int, term: asyncio.Timeout) -> None:
    """Refresh the lease and move the end of the term; let it pass when that does not succeed."""
    loop, failures = asyncio.get_running_loop(), 0
    wait_s = ttl_s / _REFRESHES_PER_TTL
    while not term.expired():
        await asyncio.sleep(wait_s)
        asked = loop.time()
        try:
            left_s = await store.refresh(lease)
        except LeaseLostError:
            deadline: float = asked
        except StoreUnavailableError as error:
            failures += 1
            wait_s = back_off(failures)
            log.warning("lease not refreshed", extra={"reason": str(error)})
            continue
        else:
            deadline = asked + left_s * (1 - _MARGIN)
        wait_s, failures = ttl_s / _REFRESHES_PER_TTL, 0
        if not term.expired():
            term.reschedule(deadline)


async def _resign(store: Store, lease: int) -> None:
    """Let the next leader begin at once; without the store it waits for the lease."""
    with contextlib.suppress(StoreUnavailableError):
        await store.revoke(lease)
