"""How tests wait: for a condition, never for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

DEADLINE_S = 20.0
_POLL_S = 0.002


async def until(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """Return as soon as `condition()` is true. Raises TimeoutError past the deadline."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # anything may be the condition, not only an event
            await asyncio.sleep(_POLL_S)


def until_sync(condition: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    """The same outside an event loop, for conditions that ask other processes."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"the condition did not hold within {deadline_s} s")
        time.sleep(10 * _POLL_S)
