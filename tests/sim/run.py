"""One simulated run: inject faults, random by a seed or given as a list; then check the invariants.

A run with violations prints its faults as a list. `run(seed, faults=...)` repeats it: a regression test.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.sim.client import SimClient
from tests.sim.world import RETENTION_S, World, simulated

FAULTS_WITHIN_S = 3.0
CALM_WITHIN_S = 150.0  # longer than any timeout of the cluster
KINDS = (
    "crash worker", "crash worker", "drain worker", "pause worker",
    "crash engine", "crash engine", "stop engine",
    "crash gateway", "crash gateway", "pause gateway", "crash controller", "pause controller",
    "clock jumps", "crash text", "stop text",
    "store away", "store away, leases end", "slow network",
    "cut gateway from worker", "cut worker from store", "cut gateway from store",
    "break connections of clients",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault `at` seconds after the first request, for `seconds`. The number `victim` picks the process."""

    at: float
    kind: str
    victim: int = 0
    seconds: float = 0.0


@dataclass
class Outcome:
    """The result of a run."""

    seed: int
    faults: list[Fault]
    violations: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    simulated_s: float = 0.0
    finished: int = 0
    failed: int = 0
    failovers: int = 0
    resumed: int = 0
    stale: int = 0


def random_faults(chance: random.Random) -> list[Fault]:
    """1 to 4 random faults."""
    faults = []
    for _ in range(chance.randint(1, 4)):
        at = round(chance.uniform(0.0, FAULTS_WITHIN_S), 3)
        seconds = round(chance.choice((0.3, 1.0, 2.0, 4.0, 7.0)) * chance.uniform(0.5, 1.5), 3)
        faults.append(Fault(at, chance.choice(KINDS), chance.randrange(1 << 16), seconds))
    return sorted(faults, key=lambda fault: fault.at)


def run(seed: int, faults: Sequence[Fault] | None = None) -> Outcome:
    """Simulate one seed."""
    chance = random.Random(f"faults {seed}")
    outcome = Outcome(seed, list(random_faults(chance) if faults is None else faults))
    world = World(seed)
    logging.disable(logging.ERROR)
    with simulated(world):
        asyncio.set_event_loop(world.loop)
        try:
            world.loop.run_until_complete(_live(world, outcome))
        except Exception as error:  # an exception out of a shell is a violation, too
            outcome.violations.append(f"the run broke: {error!r}")
        finally:
            outcome.simulated_s = world.loop.time() - 1000
            outcome.violations += world.violations
            outcome.events = world.events
            logging.disable(logging.NOTSET)
            world.end()
            world.loop.bury()
            asyncio.set_event_loop(None)
    return outcome


async def _live(world: World, outcome: Outcome) -> None:
    await world.start()
    await _until(world, world.is_whole, 30.0, "the cluster did not get up")
    began = world.loop.time()
    for fault in outcome.faults:
        world.loop.call_at(began + fault.at, FaultInjector(world).inject, fault)
    clients = [SimClient(world, number) for number in range(6)]
    for client in clients:
        work = client.process.start(client.run())
        work.add_done_callback(lambda done, world=world: _raised(world, done))
        await asyncio.sleep(world.chance.uniform(0.0, 0.6))
    over = [lambda client=client: client.ended or bool(client.error) for client in clients]
    await _until(world, lambda: all(ended() for ended in over), CALM_WITHIN_S, "streams hang")
    last = max((fault.at + fault.seconds for fault in outcome.faults), default=0.0)
    await asyncio.sleep(max(0.0, began + last - world.loop.time()) + 0.1)
    await _until(world, world.is_whole, 60.0, "the cluster did not become whole again")
    # Retention timers run twice: while an attempt is an orphan, and again once it has finished.
    await asyncio.sleep(2 * RETENTION_S + 0.5)
    _judge(world, outcome, clients)


def _raised(world: World, done: asyncio.Task[Any]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        world.violations.append(f"a client broke: {error!r}")


async def _until(world: World, condition: Any, within_s: float, what: str) -> None:
    end = world.loop.time() + within_s
    while not condition():
        if world.loop.time() > end:
            world.violations.append(what)
            return
        await asyncio.sleep(0.05)


def _judge(world: World, outcome: Outcome, clients: list[SimClient]) -> None:
    for client in clients:
        client.check(whole=False)
        outcome.finished += client.ended
        outcome.failed += bool(client.error)
        # Every lost attempt needs a fault of its own, so four faults may exhaust the attempts.
        if client.error and not (client.error == "ATTEMPTS_EXHAUSTED" and len(outcome.faults) >= 4):
            world.violations.append(f"{client.process} ended with {client.error}")
    for name in world.gateway_names:
        gateway = world.gateways[name]
        counters = gateway.dispatcher.counters
        outcome.failovers += counters.failovers
        outcome.resumed += counters.resumed
        outcome.stale += counters.stale_frames_dropped
        try:
            gateway.dispatcher.check_integrity()
        except AssertionError as error:
            world.violations.append(f"{name}: {error}")
        if gateway._live_requests:
            world.violations.append(f"{name} still has {len(gateway._live_requests)} requests")
    for name, worker in world.workers.items():
        if worker._service.leader is not None:
            book = worker._service.leader._book
            book.check_integrity()
            if book.retained:
                world.violations.append(f"{name} still holds {len(book)} requests, {book.retained} outputs")
    for process, scheduler in world.schedulers:
        if process.alive:
            scheduler.check_integrity()
            load = scheduler.load
            if load.running or load.waiting or load.kv_blocks_free != load.kv_blocks_total:
                world.violations.append(f"{process}: a leak: {load}")
    left = [key for key in world.store._entries if key.startswith("/phalanx.requests/")]
    alive = [key for key in left if world.store._lease_of.get(key) is not None]
    if len(left) != len(alive):
        world.violations.append(f"{len(left) - len(alive)} checkpoints without a lease")


class FaultInjector:
    """Injects faults."""

    def __init__(self, world: World) -> None:
        self._world = world

    def inject(self, fault: Fault) -> None:
        """Inject a fault, and schedule its end."""
        world, kind = self._world, fault.kind
        worker = world.worker_names[fault.victim % len(world.worker_names)]
        gateway = world.gateway_names[(fault.victim >> 4) % len(world.gateway_names)]
        controller = world.controller_names[(fault.victim >> 6) % len(world.controller_names)]
        world.note(f"{kind} ({worker}, {gateway}, {controller}) for {fault.seconds} s")
        match kind:
            case "crash worker":
                self._crash(worker, world.boot_worker, fault.seconds)
            case "drain worker":
                self._drain(worker, fault.seconds)
            case "crash gateway":
                self._crash(gateway, world.boot_gateway, fault.seconds)
            case "crash controller":
                self._crash(controller, world.boot_controller, fault.seconds)
            case "pause controller":
                self._pause(controller, fault.seconds)
            case "clock jumps":
                world.skew[controller] = fault.seconds * (20 if fault.victim % 3 else -20)
            case "crash engine" | "stop engine" | "crash text" | "stop text":
                self._hurt_child(fault)
            case "pause worker":
                self._pause(worker, fault.seconds)
            case "pause gateway":
                self._pause(gateway, fault.seconds)
            case "store away" | "store away, leases end":
                if not world.store_away:
                    world.store_goes(frozen=kind == "store away")
                    world.loop.call_later(fault.seconds, world.store_comes)
            case "break connections of clients":
                world.net.break_between(gateway, "client")
            case "cut gateway from worker":
                self._cut(gateway, worker, fault.seconds)
            case "cut worker from store":
                self._cut(worker, "etcd", fault.seconds)
            case "cut gateway from store":
                self._cut(gateway, "etcd", fault.seconds)
            case "slow network":
                world.net.latency_s = 0.05
                world.loop.call_later(fault.seconds, setattr, world.net, "latency_s", 0.001)
            case _:
                raise ValueError(kind)

    def _crash(self, name: str, boot: Any, seconds: float) -> None:
        process = self._world.processes[name]
        if process.alive:
            process.die()
            self._again(name, boot, seconds)

    def _drain(self, name: str, seconds: float) -> None:
        process = self._world.processes[name]
        if process.alive:
            process.start(self._world.workers[name].leave(process))
            process.on_death.append(lambda: self._again(name, self._world.boot_worker, seconds))

    def _again(self, name: str, boot: Any, seconds: float) -> None:
        """Boot a process after a while, unless it has been booted."""
        world = self._world

        def again() -> None:
            if not world.processes[name].alive:
                boot(name)

        # In an empty context: a callback in the context of a dead process never runs.
        world.loop.call_later(seconds, again, context=contextvars.Context())

    def _pause(self, name: str, seconds: float) -> None:
        process = self._world.processes[name]
        process.stop()
        self._world.loop.call_later(seconds, process.resume)

    def _hurt_child(self, fault: Fault) -> None:
        how, kind = fault.kind.split()
        mine = [child for _, child in sorted(self._world.children.items()) if f"/{kind}" in child.name]
        if not mine:
            return
        child = mine[fault.victim % len(mine)]
        self._world.note(f"  {child}")
        if how == "stop":
            child.stop()
        else:
            child.die()

    def _cut(self, one: str, other: str, seconds: float) -> None:
        self._world.net.cut(one, other)
        self._world.loop.call_later(seconds, self._world.net.mend, one, other)
