"""An event loop with a simulated clock and no I/O: when no callback is ready, time jumps to the next timer.

Every callback belongs to a simulated process, found by its context. A process can be stopped; when it wakes,
it runs all callbacks that have become due meanwhile. A process can die; then none of its callbacks runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import heapq
import sys
from collections.abc import Callable, Coroutine
from typing import Any


class Process:
    """One simulated operating-system process."""

    def __init__(self, loop: SimLoop, name: str) -> None:
        self.loop, self.name = loop, name
        self.alive, self.stopped = True, False
        self.waiting: list[asyncio.Handle] = []
        self.context = contextvars.copy_context()
        self.context.run(_CURRENT.set, self)
        self.on_death: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return self.name

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as part of this process."""
        return self.loop.create_task(work, context=self.context)

    def later(self, delay_s: float, call: Callable[..., object], *arguments: object) -> None:
        """Call a function of this process after a delay, unless the process is dead by then."""
        self.loop.call_later(delay_s, call, *arguments, context=self.context)

    def stop(self) -> None:
        """SIGSTOP."""
        self.stopped = True

    def resume(self) -> None:
        """SIGCONT."""
        self.stopped = False
        for handle in self.waiting:
            self.loop.put_back(handle)
        self.waiting.clear()

    def die(self) -> None:
        """SIGKILL. Calls the functions in `on_death`, by which others notice."""
        if self.alive:
            self.alive = False
            self.waiting.clear()
            for call in self.on_death:
                call()


_CURRENT: contextvars.ContextVar[Process] = contextvars.ContextVar("process")


def current() -> Process:
    """The process whose callback is running."""
    return _CURRENT.get()


class SimLoop(asyncio.BaseEventLoop):
    """The event loop of all processes. Simulated time begins at 1000 s."""

    _ready: Any
    _scheduled: Any

    def __init__(self) -> None:
        super().__init__()
        self._now = 1000.0
        self.steps = 0
        self._tasks: list[asyncio.Task[Any]] = []

    def time(self) -> float:
        """Simulated seconds."""
        return self._now

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """See BaseEventLoop. Keeps every task: a collected one runs its `finally` outside any process."""
        task = super().create_task(coro, **options)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._tasks.append(task)
        return task

    def bury(self) -> None:
        """Close all coroutines that are still suspended."""
        hook, sys.unraisablehook = (
            sys.unraisablehook,
            lambda _: None,
        )  # ignore exceptions of closing coroutines: the run is over
        try:
            for task in self._tasks:
                coroutine = task.get_coro()
                if coroutine is not None and not task.done():
                    with contextlib.suppress(BaseException):
                        coroutine.close()
            self._ready.clear()
            self._scheduled.clear()
            self._tasks.clear()
            self.close()
            gc.collect(1)
        finally:
            sys.unraisablehook = hook

    def put_back(self, handle: asyncio.Handle) -> None:
        """Schedule a handle that waited while its process was stopped."""
        self._ready.append(handle)

    def _run_once(self) -> None:
        scheduled, ready = self._scheduled, self._ready
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready:
            if not scheduled:
                raise RuntimeError("deadlock: no callback is ready and no timer is set")
            self._now = max(self._now, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            ready.append(handle)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(_CURRENT, None)
            if process is not None:
                if not process.alive:
                    continue
                if process.stopped:
                    process.waiting.append(handle)
                    continue
            self.steps += 1
            handle._run()

    def _write_to_self(self) -> None:
        pass

    def _process_events(self, event_list: Any) -> None:
        pass
