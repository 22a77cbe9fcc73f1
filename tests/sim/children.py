"""Simulated engines and text processes, and `SimChild`, which replaces `dataplane.shard.process.Child`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.errors import RequestError
from engine.ipc.wire import (
    BEAT_S,
    Alive,
    Beat,
    Began,
    CancelRequest,
    EngineFailed,
    EngineReady,
    Message,
    Probe,
    Rendezvous,
    StartEngine,
    StartText,
    Step,
    StepEnded,
    SubmitRequest,
    TextReady,
)
from engine.request import Delta, Refusal
from engine.scheduling.scheduler import Scheduler
from tests.shard.fake_text import FakeText
from tests.sim.loop import Process, current
from tests.sim.model import EOS, LIMITS, MAX_MODEL_LEN, VOCABULARY, Rank

if TYPE_CHECKING:
    from tests.sim.world import World

PIPE_S = 0.0002
LOAD_S = (0.1, 0.4)
STEP_S = (0.01, 0.03)


class SimChild:
    """See `dataplane.shard.process.Child` and `TextChild`: a process of its own that dies with its worker."""

    world: World  # set before each run: the worker that creates a child does not know the world
    numbers = itertools.count(1)

    def __init__(
        self,
        command: Sequence[str],
        start: Message,
        *,
        on_spawned: Callable[[int], None],
        on_message: Callable[[Message], None],
        launch: object = None,
        sockets: Mapping[str, Callable[[Message], None]] | None = None,
    ) -> None:
        self._worker, self._start = current(), start
        self._send_step = (sockets or {}).get("--text-fd")
        self._on_spawned, self._on_message = on_spawned, on_message
        self.pid = next(self.numbers)
        kind = "engine" if isinstance(start, StartEngine) else "text"
        self.process = Process(self._worker.loop, f"{self._worker.name.partition('/')[0]}/{kind}-{self.pid}")
        self._worker.on_death.append(self.process.die)
        self._ended = asyncio.Event()
        self._arrives = {"up": 0.0, "down": 0.0}
        self._engine = 0  # the engine whose steps a text process reads
        self._program: SimEngine | SimText | None = None
        self._killed = False

    def send(self, message: Message) -> None:
        """Send to the child; messages arrive in order."""
        self._pass("down", self.process, self._take, message)

    def connect(self, engine: int) -> Callable[[Message], None]:
        """A function that sends a step of the engine with this number. See `TextChild.connect`."""
        self._engine, way = engine, f"engine {engine}"
        self._arrives[way] = 0.0
        return lambda step: self._pass(way, self.process, self._take_step, engine, step)

    def kill(self) -> None:
        """SIGKILL."""
        self._killed = True
        self.process.die()

    async def run(self) -> str:
        """Start the child and wait until it ends; returns how it ended."""
        if self._killed:
            return "was never started"
        self.process.on_death.append(self._dead)
        self.world.children[self.pid] = self.process
        if isinstance(self._start, StartEngine):
            self._program = SimEngine(self.world, self.process, self._send_up, self._send_step)
        else:
            self._program = SimText(self._send_up)
        self._on_spawned(self.pid)
        self.process.start(self._beat())
        self.send(self._start)
        await self._ended.wait()
        del self.world.children[self.pid]
        return "was killed by SIGKILL"

    async def _beat(self) -> None:
        while True:
            self._send_up(Beat())
            await asyncio.sleep(BEAT_S)

    def _take(self, message: Message) -> None:
        assert self._program is not None
        self._program.take(message)

    def _take_step(self, engine: int, step: Step) -> None:
        assert isinstance(self._program, SimText)
        if engine == self._engine:
            self._program.take_step(engine, step)

    def _send_up(self, message: Message) -> None:
        """Send from the child to the worker; messages arrive in order."""
        self._pass("up", self._worker, self._on_message, message)

    def _dead(self) -> None:
        self._pass("up", self._worker, self._ended.set)

    def _pass(self, way: str, to: Process, call: Callable[..., object], *arguments: object) -> None:
        now = to.loop.time()
        self._arrives[way] = max(self._arrives[way] + 1e-9, now + PIPE_S)
        to.later(self._arrives[way] - now, call, *arguments)


class SimText:
    """A text process. Token ids of a prompt are its code points; the text of token t is "<t>"."""

    def __init__(self, send_up: Callable[[Message], None]) -> None:
        self._send_up, self._fake = send_up, FakeText(send_up)

    def take(self, message: Message) -> None:
        """A message of the worker."""
        if isinstance(message, StartText):
            self._send_up(TextReady(5))
        else:
            self._fake.handle(message)

    def take_step(self, engine: int, step: Step) -> None:
        """A step of an engine."""
        self._send_up(replace(self._fake.fill(step), engine=engine))


class SimEngine:
    """One rank. Rank 0 runs the real scheduler. A step ends only when every rank has answered."""

    def __init__(
        self,
        world: World,
        process: Process,
        send_up: Callable[[Message], None],
        send_step: Callable[[Message], None] | None,
    ) -> None:
        self._world, self._process, self._send_up, self._send_step = world, process, send_up, send_step
        self._group: list[SimEngine] = []
        self._scheduler: Scheduler | None = None
        self._inbox: list[Message] = []
        self._changed = asyncio.Event()
        self._rank = Rank()

    def take(self, message: Message) -> None:
        """A message of the worker."""
        match message:
            case StartEngine():
                self._process.start(self._begin(message.config))
            case Rendezvous(address):
                self._process.start(self._join(address))
            case _:
                self._inbox.append(message)
                self._changed.set()

    async def _begin(self, config: EngineConfig) -> None:
        await asyncio.sleep(self._world.chance.uniform(*LOAD_S))
        self._size = config.tp * config.pp
        self._epoch = config.epoch
        if config.rank == 0:
            address = f"{self._process.name}:{config.epoch}"
            self._group = self._world.groups.setdefault(address, [])
            self._group.append(self)
            if self._size > 1:
                self._send_up(Rendezvous(address))
            await self._gather()
            self._send_up(EngineReady("hash", MAX_MODEL_LEN, VOCABULARY, (EOS,), STEP_S[0]))
            await self._serve()

    async def _join(self, address: str) -> None:
        self._group = self._world.groups[address]
        self._group.append(self)
        self._send_up(EngineReady("hash", MAX_MODEL_LEN, VOCABULARY, (EOS,)))

    async def _gather(self) -> None:
        while len(self._group) < self._size:
            await asyncio.sleep(0.02)
        for one in self._group:
            # A rank that dies closes its sockets, so the other ranks read EOF.
            one._process.on_death.append(self._peer_gone)

    def _peer_gone(self) -> None:
        for one in self._group:
            if one._process.alive:
                one._process.later(PIPE_S, one._give_up)

    def _give_up(self) -> None:
        self._send_up(EngineFailed("PEER_LOST", "another rank is gone", permanent=False))
        self._process.later(PIPE_S * 2, self._process.die)

    async def _all_ranks(self) -> None:
        """A collective operation: ends when every rank has taken part."""
        waiting = []
        for one in self._group[1:]:
            answered = self._process.loop.create_future()
            waiting.append(answered)
            one._process.later(PIPE_S, self._answer, answered)
        for answered in waiting:
            await answered

    def _answer(self, answered: asyncio.Future[None]) -> None:
        def answer() -> None:
            if not answered.done():
                answered.set_result(None)

        self._process.later(PIPE_S, answer)

    async def _serve(self) -> None:
        self._scheduler = scheduler = Scheduler(LIMITS, epoch=self._epoch)
        self._world.schedulers.append((self._process, scheduler))
        step = 0
        while True:
            if not self._inbox and not scheduler.has_work:
                self._changed.clear()
                await self._changed.wait()
            inbox, self._inbox = self._inbox, []
            accepted: list[str] = []
            failed: list[Refusal] = []
            deltas: list[Delta] = []
            probed = False
            for message in inbox:
                match message:
                    case SubmitRequest(request):
                        try:
                            deltas += scheduler.submit(request, self._process.loop.time())
                            accepted.append(request.id)
                        except RequestError as error:
                            failed.append(Refusal(request.id, error.reason, str(error)))
                    case CancelRequest(id, choice):
                        scheduler.cancel(id, choice)
                    case Probe():
                        probed = True
            now = self._process.loop.time()
            plan = scheduler.schedule(now)
            if plan is not None:
                self._send_up(Began(plan.tokens))
                await asyncio.sleep(self._world.chance.uniform(*STEP_S))
                await self._all_ranks()
                sampled = self._rank.run(plan)
                deltas += scheduler.apply(sampled, self._process.loop.time())
                self._send_up(StepEnded())
            elif probed:
                await self._all_ranks()
            if plan is not None or accepted or failed or deltas:
                step += 1
                assert self._send_step is not None, "only rank 0 serves"
                self._send_step(Step(step, scheduler.load, tuple(accepted), tuple(deltas), tuple(failed)))
            if probed:
                self._send_up(Alive())
