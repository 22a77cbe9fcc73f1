"""Finds faults that send no message: a child that hangs, a pause of the worker itself, a failing GPU.

Owns: the clock of the watchdogs, which children they watch.
Does not own: deadlines (`watchdog`), judgement of a GPU (`health`), the reaction (`supervisor`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from dataplane.shard.device import index_of
from dataplane.shard.events import BeginServing, Event, Hung, WorkerPaused
from dataplane.shard.health import Nvml, Verdict, judge
from dataplane.shard.watchdog import CHECK_S, Probe, Pulse, Silent, Watchdog
from engine.ipc import wire
from engine.ipc.wire import Alive, Began, EngineReady, Message, StepEnded, TextReady
from phalanx.store.registration import LEASE_TTL_S

_HEALTH_S = 5.0

log = logging.getLogger(__name__)


class Monitor:
    """Watches the heartbeats of every child, and the steps of the engine that serves.

    Args:
        handle: is called with `Hung` and `WorkerPaused`.
        send: sends a message to a child.
    """

    def __init__(self, handle: Callable[[Event], None], send: Callable[[int, Message], None]) -> None:
        self._handle, self._send = handle, send
        self._pulses: dict[int, Pulse] = {}
        self._engine, self._watchdog = 0, None  # type: tuple[int, Watchdog | None]

    def spawned(self, child: int) -> None:
        """A child runs."""
        self._pulses[child] = Pulse(time.monotonic())

    def exited(self, child: int) -> None:
        """A child has ended."""
        self._pulses.pop(child, None)

    def begin_serving(self, serving: BeginServing) -> None:
        """An engine serves from now on."""
        self._engine, self._watchdog = serving.engine, Watchdog(time.monotonic(), serving.ready.step_s)

    def end_serving(self) -> None:
        """No engine serves."""
        self._watchdog = None

    def received(self, child: int, message: Message) -> None:
        """A child has sent a message of any kind."""
        now = time.monotonic()
        if pulse := self._pulses.get(child):
            if isinstance(message, EngineReady | TextReady):
                pulse.ready()
            pulse.heard(now)
        if self._watchdog is not None and child == self._engine:
            match message:
                case Began(tokens):
                    self._watchdog.began(tokens, now)
                case StepEnded():
                    self._watchdog.ended(now)
                case Alive():
                    self._watchdog.answered(now)

    async def run(self) -> None:
        """Check until cancelled."""
        checked = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_S)
            now = time.monotonic()
            since_last, checked = now - checked, now
            if since_last > LEASE_TTL_S:
                self._handle(WorkerPaused(since_last))
            for child, pulse in list(self._pulses.items()):
                if (silent := pulse.check(now)) is not None:
                    self._handle(Hung(child, silent.status))
            match self._watchdog and self._watchdog.check(now):
                case Probe():
                    self._send(self._engine, wire.Probe())
                case Silent(status):
                    self._handle(Hung(self._engine, status))


async def watch_device(device: str) -> str:
    """Return why a GPU should get no more work, once there is a reason that does not go away by itself.

    Waits for ever where the GPU's health cannot be read.
    """
    try:
        nvml = await asyncio.to_thread(Nvml, index_of(device))
    except Exception as error:  # of the driver or its library
        log.warning("the device's health is not known", extra={"reason": repr(error)})
        return await asyncio.Future()
    first, last = await asyncio.to_thread(nvml.read), Verdict()
    while not last.ailment:
        await asyncio.sleep(_HEALTH_S)
        verdict = judge(await asyncio.to_thread(nvml.read), first)
        if verdict != last:
            log.warning("device", extra={"ailment": verdict.ailment, "remarks": verdict.remarks})
        last = verdict
    return last.ailment
