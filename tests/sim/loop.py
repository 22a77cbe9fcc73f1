"""An event loop without a clock and without I/O: when nothing is left to do now, it is the next timer's time.

What runs in it belongs to a process, by the context in which it was started. A process can stand still, and
then goes on with all that has come due meanwhile; or die, and then nothing of it runs any more.
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
        self.alive, self.standing = True, False
        self.held: list[asyncio.Handle] = []
        self.context = contextvars.copy_context()
        self.context.run(_CURRENT.set, self)
        self.on_death: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return self.name

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as part of this process."""
        return self.loop.create_task(work, context=self.context)

    def later(self, delay_s: float, call: Callable[..., object], *arguments: object) -> None:
        """Call a function of this process after a while, unless it is dead by then."""
        self.loop.call_later(delay_s, call, *arguments, context=self.context)

    def stand(self) -> None:
        """SIGSTOP."""
        self.standing = True

    def wake(self) -> None:
        """SIGCONT."""
        self.standing = False
        for handle in self.held:
            self.loop.put_back(handle)
        self.held.clear()

    def die(self) -> None:
        """SIGKILL. Others hear of it by what they have registered in `on_death`."""
        if self.alive:
            self.alive = False
            self.held.clear()
            for call in self.on_death:
                call()


_CURRENT: contextvars.ContextVar[Process] = contextvars.ContextVar("process")


def current() -> Process:
    """The process that runs now."""
    return _CURRENT.get()


class SimLoop(asyncio.BaseEventLoop):
    """The loop. Time begins at 1000 s and is that of every process."""

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
        """See BaseEventLoop. Tasks are kept: one that was collected would run its `finally` in no process."""
        task = super().create_task(coro, **options)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._tasks.append(task)
        return task

    def bury(self) -> None:
        """Let go of everything that is suspended for ever."""
        hook, sys.unraisablehook = (
            sys.unraisablehook,
            lambda _: None,
        )  # what it does on its way out is of no world
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
        """Run a handle that was held up."""
        self._ready.append(handle)

    def _run_once(self) -> None:
        scheduled, ready = self._scheduled, self._ready
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        if not ready:
            if not scheduled:
                raise RuntimeError("everything waits for something that cannot come")
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
                if process.standing:
                    process.held.append(handle)
                    continue
            self.steps += 1
            handle._run()

    def _write_to_self(self) -> None:
        pass

    def _process_events(self, event_list: Any) -> None:
        pass
