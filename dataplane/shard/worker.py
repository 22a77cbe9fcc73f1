"""A worker: one device, its children, its place in the cluster, its server.

Owns: the running children and the wiring between supervisor, registration, leader and server.
Does not own: decisions (`supervisor`, `requests`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse

from dataplane.shard import tracing
from dataplane.shard.device import index_of, memory_bytes
from dataplane.shard.events import (
    Abandoned,
    BeginServing,
    EndServing,
    Event,
    Exited,
    Form,
    Formed,
    Hung,
    Instruction,
    Kill,
    PeerFailed,
    Publish,
    Received,
    SendRendezvous,
    Spawned,
    SpawnEngine,
    SpawnText,
    StoodStill,
    Stop,
    Withdraw,
)
from dataplane.shard.health import Nvml, Verdict, judge
from dataplane.shard.launch import ForkServer, Launch, spawn
from dataplane.shard.leader import Leader
from dataplane.shard.observe import observe
from dataplane.shard.process import Child
from dataplane.shard.server import SERVICE, ShardServer
from dataplane.shard.supervisor import Supervisor
from dataplane.shard.watchdog import CHECK_S, Probe, Pulse, Silent, Watchdog
from engine.ipc import wire
from engine.ipc.wire import (
    Alive,
    Beat,
    Began,
    Encoded,
    EngineReady,
    Loading,
    Message,
    NotEncoded,
    Rendezvous,
    Step,
    TextReady,
)
from phalanx.internal.v1 import shard_pb2, shard_pb2_grpc
from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError
from phalanx.store.interface import Store
from phalanx.store.keys import Keys
from phalanx.store.records import ShardRecord, ShardState, WorkerRecord
from phalanx.store.registration import LEASE_TTL_S, Registration
from phalanx.store.snapshot import Snapshot

PATIENCE_S, PATIENCE_CAP_S = 0.5, 30.0
"""How long a controller has to form anew what has failed: it may know of a better place, or that nobody wants
the replica. Longer each time that a life fails within `LIVED_S`."""
LIVED_S = 60.0
_ASK_AGAIN_S, _ASK_TIMEOUT_S = 0.5, 2.0
_STREAMS_END_S = 0.5
_UNROUTABLE_S = 0.5  # until every gateway has heard that this worker leaves
_DRAIN_TICK_S = 0.1
_HEALTH_S = 5.0
_MAX_UNANSWERED = 5  # questions in a row

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a worker is called and where it runs. `listen` is host:port, port 0 takes a free one."""

    name: str
    host: str
    device: str
    listen: str
    cluster: str = "default"


@dataclass(frozen=True, slots=True)
class Commands:
    """How children are started; `--fd N` is appended. Engines are forked where there is a `forkserver`."""

    engine: tuple[str, ...] = (sys.executable, "-m", "engine.processes.rank")
    text: tuple[str, ...] = (sys.executable, "-m", "engine.text.process")
    forkserver: tuple[str, ...] = ()


class Worker:
    """One boot of a shard server."""

    def __init__(self, identity: Identity, store: Store, commands: Commands | None = None) -> None:
        self.incarnation = uuid.uuid4().hex
        self._identity, self._store = identity, store
        self._commands = commands or Commands()
        self._keys = Keys(identity.cluster)
        host = identity.listen.rpartition(":")[0]
        # A wildcard is no address that others could reach.
        self._host = identity.host if host in ("0.0.0.0", "[::]", "") else host  # noqa: S104  # compared only
        self._supervisor = Supervisor(identity.name, self.incarnation, self._host, identity.device)
        self._service = ShardServer(identity.name, self._form)
        self._children: dict[int, Child] = {}
        self._serving: BeginServing | None = None
        self._text = 0
        # The epochs of the steps that are with the text process, which outlives epochs.
        self._with_text: deque[int] = deque()
        self._watchdog: Watchdog | None = None  # of the engine that serves
        self._pulses: dict[int, Pulse] = {}  # of children
        self._health_changed = asyncio.Event()
        self._forkserver = ForkServer(self._commands.forkserver) if self._commands.forkserver else None
        self._failed, self._failed_at = 0, -math.inf  # lives that failed soon after one another

    async def run(
        self, stop: asyncio.Event, on_listening: Callable[[str], None], drain_s: float = 0.0
    ) -> None:
        """Serve until `stop`; the requests of this worker's replica then have `drain_s` to end.

        `on_listening` hears the address. Raises OSError when it cannot listen.
        """
        server = rpc.server()
        shard_pb2_grpc.add_ShardServiceServicer_to_server(self._service, server)
        health = rpc.add_health_and_reflection(server, [SERVICE])
        port = rpc.bind(server, self._identity.listen).rpartition(":")[2]
        address = f"{self._host}:{port}"
        await server.start()
        self._record = WorkerRecord(
            worker=self._identity.name,
            incarnation=self.incarnation,
            host=self._identity.host,
            address=address,
            device=self._identity.device,
            server_pid=os.getpid(),
            memory_bytes=memory_bytes(self._identity.device),
        )
        self._registration = Registration(self._store, self._keys, self._record)
        try:
            async with asyncio.TaskGroup() as self._tasks:
                background = [
                    self._tasks.create_task(self._registration.run()),
                    self._tasks.create_task(self._watch()),
                    self._tasks.create_task(self._report_health(health)),
                    self._tasks.create_task(self._watch_engine()),
                ]
                if self._identity.device != "cpu":
                    background.append(self._tasks.create_task(self._watch_device()))
                if self._forkserver is not None:
                    background.append(self._tasks.create_task(self._forkserver.run()))
                on_listening(address)
                await stop.wait()
                await self._drain(drain_s)
                self._handle(Stop())  # the children's tasks end as they are killed
                for task in background:
                    task.cancel()
        finally:
            await self._registration.close()
            await server.stop(_STREAMS_END_S)

    async def _drain(self, within_s: float) -> None:
        """Have gateways prefer other replicas, and wait until nobody needs this one or the time is up.

        What still runs then is lost here, and replayed elsewhere.
        """
        record = self._supervisor.record
        if record is None or record.state is not ShardState.READY or not within_s:
            return
        log.info("draining", extra={"replica": record.replica, "within_s": within_s})
        self._registration.announce(replace(self._record, draining=True))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await asyncio.sleep(_UNROUTABLE_S)
                await self._unneeded(record)

    async def _unneeded(self, was: ShardRecord) -> None:
        """Return when the replica that this worker was part of is no more, or has no requests."""
        request, failures = shard_pb2.PendingRequest(replica=was.replica, epoch=was.epoch), 0
        while True:
            now = self._supervisor.record
            if now is None or (now.epoch, now.state) != (was.epoch, ShardState.READY):
                return
            try:
                if not await self._pending(was.rank, request):
                    return
                failures = 0
            except PhalanxError as error:
                # Who leads no more has nothing. Who does not answer may be busy, or gone.
                failures += 1
                if error.reason in ("NOT_LEADER", "STALE_EPOCH") or failures == _MAX_UNANSWERED:
                    return
            await asyncio.sleep(_DRAIN_TICK_S)

    async def _pending(self, rank: int, request: shard_pb2.PendingRequest) -> int:
        """Requests of this worker's replica. Raises PhalanxError."""
        if rank == 0:
            return self._service.pending(request).requests
        answer: shard_pb2.PendingResponse = await self._call(self._supervisor.leader_address, request)
        return answer.requests

    async def _watch(self) -> None:
        async for change in self._store.watch(f"{self._keys.root}replicas/"):
            snapshot = Snapshot.of(change.listing, self._keys)
            for event in observe(snapshot, self._identity.name, self.incarnation):
                self._handle(event)

    def _wait_for_others(self, record: ShardRecord) -> None:
        """Give a controller time to form anew what has failed; then its leader does."""
        if record.rank != 0 or record.permanent:
            return
        now = time.monotonic()
        self._failed = self._failed + 1 if now - self._failed_at < LIVED_S else 0
        self._failed_at = now
        delay_s = min(PATIENCE_CAP_S, PATIENCE_S * 2.0 ** min(self._failed, 10))
        abandoned = Abandoned(record.epoch, record.life)
        asyncio.get_running_loop().call_later(delay_s, self._handle, abandoned)

    async def _ask(self, form: Form) -> None:
        """Ask another worker for its engine of our replica's life, and how it does until all have joined.

        The store would say as well when it fails, but is not needed to form a replica anew.
        """
        request = shard_pb2.FormRequest(
            replica=form.replica, epoch=form.epoch, life=form.life, rendezvous=form.rendezvous
        )
        while self._is_current(form):
            try:
                answer: shard_pb2.FormResponse = await self._call(form.address, request)
                if answer.failed:
                    failed = PeerFailed(form.epoch, form.rank, answer.reason, answer.permanent, form.life)
                    self._handle(failed)
            except PhalanxError as error:
                log.warning("a rank does not join", extra={"address": form.address, "reason": error.message})
            await asyncio.sleep(_ASK_AGAIN_S)

    def _is_current(self, form: Form) -> bool:
        record = self._supervisor.record
        return record is not None and (record.replica, record.epoch, record.life, record.state) == (
            form.replica, form.epoch, form.life, ShardState.STARTING,
        )  # fmt: skip

    async def _call(self, address: str, request: shard_pb2.FormRequest | shard_pb2.PendingRequest) -> Any:
        """Call another worker. Raises PhalanxError."""
        async with rpc.channel(address) as channel:
            try:
                stub = shard_pb2_grpc.ShardServiceStub(channel)
                method: Any = stub.Form if isinstance(request, shard_pb2.FormRequest) else stub.Pending
                return await method(request, timeout=_ASK_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                raise rpc.to_error(error) from error

    def _form(self, request: shard_pb2.FormRequest) -> shard_pb2.FormResponse:
        """A leader forms its replica anew. Raises PhalanxError where this worker has no part in it."""
        self._handle(Formed(request.replica, request.epoch, request.life, request.rendezvous))
        record, life = self._supervisor.record, (request.replica, request.epoch, request.life)
        if record is None or (record.replica, record.epoch, record.life) != life:
            message = (
                f"{self._identity.name} has no rank of {request.replica} in epoch {request.epoch}, "
                f"life {request.life}"
            )
            raise PhalanxError("STALE_EPOCH", message)
        if record.state is ShardState.FAILED:
            return shard_pb2.FormResponse(failed=True, reason=record.reason, permanent=record.permanent)
        return shard_pb2.FormResponse()

    async def _report_health(self, health: rpc.Health) -> None:
        states = HealthCheckResponse.ServingStatus
        while True:
            self._health_changed.clear()
            await health.set(SERVICE, states.SERVING if self._service.leader else states.NOT_SERVING)
            await self._health_changed.wait()

    async def _watch_engine(self) -> None:
        """Notice when a child hangs, and when this process stood still itself."""
        checked = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_S)
            now = time.monotonic()
            stood_still, checked = now - checked, now
            if stood_still > LEASE_TTL_S:
                self._handle(StoodStill(stood_still))
            for child, pulse in list(self._pulses.items()):
                if (silent := pulse.check(now)) is not None:
                    self._handle(Hung(child, silent.status))
            watchdog, serving = self._watchdog, self._serving
            if watchdog is None or serving is None:
                continue
            match watchdog.check(now):
                case Probe():
                    self._send(serving.engine, wire.Probe())
                case Silent(status):
                    self._handle(Hung(serving.engine, status))

    async def _watch_device(self) -> None:
        """Notice when the GPU is failing: from then on others are preferred, and nothing new comes here."""
        try:
            nvml = await asyncio.to_thread(Nvml, index_of(self._identity.device))
        except Exception as error:  # of the driver or its library
            log.warning("the device's health is not known", extra={"reason": repr(error)})
            return
        first, told = await asyncio.to_thread(nvml.read), Verdict()
        while not told.ailment:  # of which it does not recover by itself
            await asyncio.sleep(_HEALTH_S)
            verdict = judge(await asyncio.to_thread(nvml.read), first)
            if verdict != told:
                log.warning("device", extra={"ailment": verdict.ailment, "remarks": verdict.remarks})
            told = verdict
        self._record = replace(self._record, draining=True, ailment=told.ailment)
        self._registration.announce(self._record)

    def _handle(self, event: Event) -> None:
        for instruction in self._supervisor.handle(event):
            self._do(instruction)

    def _do(self, instruction: Instruction) -> None:
        match instruction:
            case SpawnEngine(child, start):
                launch = spawn if self._forkserver is None else self._forkserver.launch
                self._spawn(child, self._commands.engine, start, launch)
            case SpawnText(child, start):
                self._text = child
                self._with_text.clear()
                self._spawn(child, self._commands.text, start)
            case Kill(child):
                if child in self._children:
                    self._children[child].kill()
            case SendRendezvous(child, address):
                self._send(child, Rendezvous(address))
            case Publish(record):
                log.info(
                    "shard",
                    extra={
                        "replica": record.replica,
                        "epoch": record.epoch,
                        "rank": record.rank,
                        "state": record.state.name,
                        "reason": record.reason,
                    },
                )
                self._registration.publish(record)
                if record.state is ShardState.FAILED:
                    self._wait_for_others(record)
            case Form():
                self._tasks.create_task(self._ask(instruction))
            case Withdraw():
                self._registration.publish(None)
            case BeginServing():
                self._begin(instruction)
            case EndServing(_, reason):
                leader, self._service.leader, self._serving = self._service.leader, None, None
                self._watchdog = None
                self._health_changed.set()
                if leader is not None:
                    leader.end(reason)

    def _begin(self, serving: BeginServing) -> None:
        def to_text(message: Message) -> None:
            if isinstance(message, Step):
                self._with_text.append(serving.epoch)
            self._send(serving.text, message)

        self._serving = serving
        self._watchdog = Watchdog(time.monotonic(), serving.ready.step_s)
        self._service.leader = Leader(
            serving,
            worker=self._identity.name,
            incarnation=self.incarnation,
            to_engine=lambda message: self._send(serving.engine, message),
            to_text=to_text,
            on_ended=lambda ended: tracing.record(ended, serving.replica, serving.epoch),
        )
        self._health_changed.set()

    def _spawn(self, child: int, command: tuple[str, ...], start: Message, launch: Launch = spawn) -> None:
        self._children[child] = Child(
            command,
            start,
            launch=launch,
            on_spawned=lambda pid: self._spawned(child, pid),
            on_message=lambda message: self._received(child, message),
        )
        self._tasks.create_task(self._attend(child))

    def _spawned(self, child: int, pid: int) -> None:
        self._pulses[child] = Pulse(time.monotonic())
        self._handle(Spawned(child, pid))

    async def _attend(self, child: int) -> None:
        status = await self._children[child].run()
        del self._children[child]
        self._pulses.pop(child, None)
        log.info("child ended", extra={"child": child, "status": status})
        self._handle(Exited(child, status))

    def _send(self, child: int, message: Message) -> None:
        if child in self._children:
            self._children[child].send(message)

    def _received(self, child: int, message: Message) -> None:
        leader, serving = self._service.leader, self._serving
        if pulse := self._pulses.get(child):
            if isinstance(message, EngineReady | TextReady):
                pulse.ready()
            pulse.heard(time.monotonic())
        if serving is not None and child == serving.engine:
            self._heard(message)
        match message:
            case Step():
                if child == self._text:
                    self._step_from_text(message)
                elif leader is not None and serving is not None and child == serving.engine:
                    leader.from_engine(message)
            case Encoded() | NotEncoded():
                if leader is not None:
                    leader.from_text(message)
            case Loading(fraction):
                log.debug("loading", extra={"child": child, "fraction": fraction})
            case Began() | Alive() | Beat():
                pass  # of interest to the watchdogs alone
            case _:
                self._handle(Received(child, message))

    def _heard(self, message: Message) -> None:
        """Tell the watchdog what the serving engine said."""
        assert self._watchdog is not None
        match message:
            case Began(tokens):
                self._watchdog.began(tokens, time.monotonic())
            case Step(step):
                self._watchdog.reported(step, time.monotonic())
            case Alive():
                self._watchdog.answered(time.monotonic())

    def _step_from_text(self, step: Step) -> None:
        epoch = self._with_text.popleft()
        if self._service.leader is not None and self._service.leader.epoch == epoch:
            self._service.leader.from_text(step)
