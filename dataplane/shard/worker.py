"""A worker: one incarnation of a shard server, with its device, its children, its rank and its gRPC server.

A token's way: engine → text process → `_received` here → `leader.Leader` → `requests.RequestBook` → a
gateway's outbox → `server.ShardServer`.

Stale output: children have numbers that are never used again. A step carries the number of its engine, and
only steps of the engine that serves reach the leader (`_received`).

Owns: the wiring between supervisor, children, monitor, registration, leader and server.
Does not own: decisions (`supervisor`, `requests`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from grpc_health.v1.health_pb2 import HealthCheckResponse

from dataplane.shard import tracing
from dataplane.shard.children import Children, Commands
from dataplane.shard.device import memory_bytes
from dataplane.shard.drain import until_unneeded
from dataplane.shard.events import (
    AskPeerToStart,
    BeginServing,
    EndServing,
    Event,
    Exited,
    Instruction,
    Kill,
    Publish,
    Received,
    SendRendezvous,
    Spawned,
    SpawnEngine,
    SpawnText,
    Stop,
    Withdraw,
)
from dataplane.shard.forming import Forming
from dataplane.shard.leader import Leader
from dataplane.shard.monitor import Monitor, watch_device
from dataplane.shard.observe import observe
from dataplane.shard.server import SERVICE, ShardServer
from dataplane.shard.supervisor import ShardSupervisor
from engine.ipc.wire import (
    Alive,
    Beat,
    Began,
    Encoded,
    Loading,
    Message,
    NotEncoded,
    Rendezvous,
    Step,
    StepEnded,
)
from phalanx.internal.v1 import shard_pb2_grpc
from phalanx.runtime import rpc
from phalanx.store.interface import Store
from phalanx.store.keys import Keys
from phalanx.store.records import ShardRecord, ShardState, WorkerRecord
from phalanx.store.registration import Registration
from phalanx.store.snapshot import Snapshot

_STREAMS_END_S = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """A worker's name and where it runs. `listen` is host:port; port 0 takes a free one."""

    name: str
    host: str
    device: str
    listen: str
    cluster: str = "default"


class Worker:
    """One incarnation of a shard server."""

    def __init__(self, identity: Identity, store: Store, commands: Commands | None = None) -> None:
        self.incarnation = uuid.uuid4().hex
        self._identity, self._store = identity, store
        self._keys = Keys(identity.cluster)
        host = identity.listen.rpartition(":")[0]
        # Others cannot reach a wildcard address.
        self._host = identity.host if host in ("0.0.0.0", "[::]", "") else host  # noqa: S104  # compared only
        self._supervisor = ShardSupervisor(identity.name, self.incarnation, self._host, identity.device)
        self._children = Children(
            commands or Commands(),
            start_task=self._start_task,
            handle=self._handle,
            received=self._received,
        )
        self._monitor = Monitor(self._handle, self._children.send)
        self._forming = Forming(
            identity.name, self._supervisor, start_task=self._start_task, handle=self._handle
        )
        self._service = ShardServer(identity.name, self._forming.answer)
        self._serving: BeginServing | None = None
        self._health_changed = asyncio.Event()

    async def run(
        self, stop: asyncio.Event, on_listening: Callable[[str], None], drain_s: float = 0.0
    ) -> None:
        """Serve until `stop`; the requests of this worker's replica then have `drain_s` to end.

        `on_listening` is called with the address. Raises OSError when it cannot listen.
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
                    self._tasks.create_task(self._watch_store()),
                    self._tasks.create_task(self._report_health(health)),
                    self._tasks.create_task(self._monitor.run()),
                ]
                if self._identity.device != "cpu":
                    background.append(self._tasks.create_task(self._watch_device()))
                if self._children.forkserver is not None:
                    background.append(self._tasks.create_task(self._children.forkserver.run()))
                on_listening(address)
                await stop.wait()
                await self._drain(drain_s)
                self._handle(Stop())  # tasks of children end as the children are killed
                for task in background:
                    task.cancel()
        finally:
            await self._registration.close()
            await server.stop(_STREAMS_END_S)

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.create_task(work)

    async def _drain(self, within_s: float) -> None:
        """Make gateways prefer other replicas, and wait until this one is not needed or the time is up."""
        record = self._supervisor.record
        if record is None or record.state is not ShardState.READY or not within_s:
            return
        log.info("draining", extra={"replica": record.replica, "within_s": within_s})
        self._registration.announce(replace(self._record, draining=True))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await until_unneeded(self._supervisor, record, self._service.pending)

    async def _watch_store(self) -> None:
        async for change in self._store.watch(f"{self._keys.root}replicas/"):
            snapshot = Snapshot.of(change.listing, self._keys)
            for event in observe(snapshot, self._identity.name, self.incarnation):
                self._handle(event)

    async def _report_health(self, health: rpc.Health) -> None:
        states = HealthCheckResponse.ServingStatus
        while True:
            self._health_changed.clear()
            await health.set(SERVICE, states.SERVING if self._service.leader else states.NOT_SERVING)
            await self._health_changed.wait()

    async def _watch_device(self) -> None:
        """Once the GPU is failing, make gateways and controllers prefer other workers."""
        ailment = await watch_device(self._identity.device)
        self._record = replace(self._record, draining=True, ailment=ailment)
        self._registration.announce(self._record)

    def _handle(self, event: Event) -> None:
        match event:
            case Spawned(child):
                self._monitor.spawned(child)
            case Exited(child):
                self._monitor.exited(child)
        for instruction in self._supervisor.handle(event):
            self._do(instruction)

    def _do(self, instruction: Instruction) -> None:
        match instruction:
            case SpawnEngine():
                self._children.spawn_engine(instruction)
            case SpawnText():
                self._children.spawn_text(instruction)
            case Kill(child):
                self._children.kill(child)
            case SendRendezvous(child, address):
                self._children.send(child, Rendezvous(address))
            case AskPeerToStart():
                self._forming.ask(instruction)
            case Publish(record):
                self._publish(record)
            case Withdraw():
                self._registration.publish(None)
            case BeginServing():
                self._begin_serving(instruction)
            case EndServing(_, reason):
                self._end_serving(reason)

    def _publish(self, record: ShardRecord) -> None:
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
            self._forming.wait_for_controller(record)

    def _begin_serving(self, serving: BeginServing) -> None:
        self._serving = serving
        self._monitor.begin_serving(serving)
        self._service.leader = Leader(
            serving,
            worker=self._identity.name,
            incarnation=self.incarnation,
            to_engine=lambda message: self._children.send(serving.engine, message),
            to_text=lambda message: self._children.send(serving.text, message),
            on_ended=lambda ended: tracing.record(ended, serving.replica, serving.epoch),
        )
        self._health_changed.set()

    def _end_serving(self, reason: str) -> None:
        leader, self._service.leader, self._serving = self._service.leader, None, None
        self._monitor.end_serving()
        self._health_changed.set()
        if leader is not None:
            leader.end(reason)

    def _received(self, child: int, message: Message) -> None:
        self._monitor.received(child, message)
        leader, serving = self._service.leader, self._serving
        match message:
            case Step(engine=engine):
                # The text process outlives engines: a step of an earlier engine may come now.
                if leader is not None and serving is not None and engine == serving.engine:
                    leader.stepped(message)
            case Encoded() | NotEncoded():
                if leader is not None:
                    leader.encoded(message)
            case Loading(fraction):
                log.debug("loading", extra={"child": child, "fraction": fraction})
            case Began() | StepEnded() | Alive() | Beat():
                pass  # for the monitor alone
            case _:
                self._handle(Received(child, message))
