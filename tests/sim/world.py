"""A whole cluster in one thread: real cores and shells over a simulated clock, network, store and engines.

Real: gateway, dispatcher, journal, checkpoints; worker, supervisor, watchdog, request book, leader, server,
registration; reconciler, election; the scheduler. Simulated: time, processes, the network, the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import grpc

import dataplane.gateway.checkpoints
import dataplane.gateway.gateway
import dataplane.gateway.replicas
import dataplane.gateway.resumption
import dataplane.shard.children
import dataplane.shard.forming
import dataplane.shard.monitor
import dataplane.shard.peers
import dataplane.shard.retention
import phalanx.store.backoff
from controlplane import active_controller
from controlplane.view import View
from dataplane.gateway import server as gateway_server
from dataplane.gateway.gateway import Gateway
from dataplane.gateway.normalize import journal_for
from dataplane.gateway.resume import Ticket
from dataplane.gateway.router import Target
from dataplane.shard.events import Stop
from dataplane.shard.worker import Identity, Worker
from engine.scheduling.scheduler import Scheduler
from engine.weights.layouts import smaller_sizes
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.store.interface import Change, Condition, Entry, Listing, Operation, Put, StoreUnavailableError
from phalanx.store.keys import Keys
from phalanx.store.memory import MemoryStore
from phalanx.store.records import (
    ControllerRecord,
    DeploymentRecord,
    GatewayRecord,
    LayoutRecord,
    WorkerRecord,
    encode,
)
from phalanx.store.registration import Registration
from phalanx.store.snapshot import Snapshot
from phalanx.v1 import inference_pb2
from tests.sim.children import SimChild
from tests.sim.loop import Process, SimLoop, current
from tests.sim.net import End, Network

STORE_TIMEOUT_S = 0.5
RETENTION_S = 4.0
DRAIN_S = 1.5
KEYS = Keys("sim")


class _Clock:
    """Stands in for the module `time` in shells."""

    def __init__(self, loop: SimLoop) -> None:
        self.monotonic = self.time = loop.time


@contextlib.contextmanager
def simulated(world: World) -> Iterator[None]:
    """Replace clocks, sockets and child processes of the shells by those of the world."""
    clock = _Clock(world.loop)
    gateway, shard = dataplane.gateway.gateway, dataplane.shard
    replaced: list[tuple[Any, str, Any]] = [
        (gateway, "time", clock),
        (dataplane.gateway.resumption, "time", clock),
        (dataplane.gateway.replicas, "time", clock),
        (dataplane.gateway.replicas, "ReplicaStream", SimReplicaStream),
        (dataplane.gateway.replicas, "random", world.chance),
        (dataplane.gateway.checkpoints, "time", clock),
        (shard.monitor, "time", clock),
        (shard.forming, "time", clock),
        (shard.peers, "_call", call_peer),
        (shard.children, "Child", SimChild),
        (shard.children, "TextChild", SimChild),
        (shard.retention, "RETENTION_S", RETENTION_S),
        (phalanx.store.backoff, "random", world.chance),
        (phalanx.store.registration, "random", world.chance),
        (SimChild, "world", world),
        (SimChild, "numbers", itertools.count(1)),
        (SimReplicaStream, "world", world),
    ]
    before = [(where, name, getattr(where, name, None)) for where, name, _ in replaced]
    for where, name, value in replaced:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


class SimStore:
    """The store as seen by one process: with latency, and away while the process is cut off from it."""

    def __init__(self, world: World, process: Process) -> None:
        self._world, self._process = world, process

    async def _reach(self) -> None:
        await asyncio.sleep(self._world.chance.uniform(0.0005, 0.004))
        if not self._reachable():
            await asyncio.sleep(STORE_TIMEOUT_S)
            raise StoreUnavailableError("the store does not answer")

    def _reachable(self) -> bool:
        return not self._world.store_away and not self._world.net.is_cut(self._process, self._world.etcd)

    async def get(self, key: str) -> Entry | None:
        await self._reach()
        return await self._world.store.get(key)

    async def list(self, prefix: str) -> Listing:
        await self._reach()
        return await self._world.store.list(prefix)

    async def txn(self, when: Sequence[Condition], then: Sequence[Operation]) -> int | None:
        await self._reach()
        revision = await self._world.store.txn(when, then)
        await self._answered()
        return revision

    async def _answered(self) -> None:
        """The answer may be lost on its way. The write has been done all the same."""
        await asyncio.sleep(0.001)
        if not self._reachable():
            raise StoreUnavailableError("the store's answer did not come")

    async def watch(self, prefix: str) -> AsyncGenerator[Change, None]:
        while not self._reachable():
            await asyncio.sleep(0.1)
        async for change in self._world.store.watch(prefix):
            await asyncio.sleep(self._world.chance.uniform(0.0005, 0.004))
            while not self._reachable():
                await asyncio.sleep(0.1)
            yield change

    async def grant(self, ttl_s: int) -> int:
        await self._reach()
        return await self._world.store.grant(ttl_s)

    async def refresh(self, lease: int) -> float:
        await self._reach()
        left = await self._world.store.refresh(lease)
        await self._answered()
        return left

    async def revoke(self, lease: int) -> None:
        await self._reach()
        await self._world.store.revoke(lease)

    async def close(self) -> None:
        pass


class _Context:
    """A gRPC call as its server sees it."""

    def __init__(self, world: World, end: End) -> None:
        self._world, self._end = world, end

    async def read(self) -> Any:
        try:
            return await self._end.get()
        except ConnectionError:
            if self._end.why == "half-closed":
                return grpc.aio.EOF  # type: ignore[attr-defined]
            raise grpc.aio.AbortError from None

    async def write(self, item: Any) -> None:
        if self._end.closed:
            raise asyncio.CancelledError
        self._world.net.send(self._end, item)

    async def abort(self, code: Any, message: str, metadata: Any) -> None:
        self._world.net.close(self._end, PhalanxError("UNREACHABLE", message))
        raise grpc.aio.AbortError


class SimReplicaStream:
    """Replaces `dataplane.gateway.replica_stream.ReplicaStream`."""

    world: World

    def __init__(self, target: Target, hello: shard_pb2.GatewayHello) -> None:
        self.target, self._hello = target, hello
        self._process, self.gateway = current(), hello.gateway
        self._end: End | None = None
        self._closed: str | None = None
        self._unsent: list[shard_pb2.ServeRequest] = []

    def send(self, frame: shard_pb2.ServeRequest) -> None:
        assert self._end is not None
        # Send a copy: over a real wire, the two sides share no object.
        copy = shard_pb2.ServeRequest.FromString(frame.SerializeToString())
        self.world.net.send(self._end, copy)

    def close(self, reason: str) -> None:
        self._closed = reason
        if self._end is not None:
            self.world.net.close(self._end)

    async def run(
        self,
        on_hello: Callable[[shard_pb2.LeaderHello], None],
        on_frame: Callable[[shard_pb2.StepFrame], None],
    ) -> PhalanxError:
        try:
            self._end = end = await self.world.net.connect(self._process, self.target.address)
        except ConnectionError as error:
            return PhalanxError("UNREACHABLE", str(error))
        try:
            self.send(shard_pb2.ServeRequest(hello=self._hello))
            while True:
                response = shard_pb2.ServeResponse.FromString((await end.get()).SerializeToString())
                if response.WhichOneof("frame") == "hello":
                    on_hello(response.hello)
                else:
                    with self.world.watched(self, response.step):
                        on_frame(response.step)
        except ConnectionError:
            if isinstance(end.why, PhalanxError):
                return end.why
            return PhalanxError("UNREACHABLE", self._closed or "the connection broke")
        finally:
            self.world.net.close(end)


async def call_peer(address: str, method: str, request: object) -> Any:
    """See `dataplane.shard.peers`."""
    world = SimChild.world
    try:
        end = await world.net.connect(current(), address)
        world.net.send(end, request)
        answer = await end.get()
    except ConnectionError as error:
        raise PhalanxError("UNREACHABLE", str(error)) from error
    if isinstance(answer, PhalanxError):
        raise answer
    return answer


class SimWorker(Worker):
    """A worker without its gRPC server: gateways connect over the simulated network."""

    async def live(self, world: World, process: Process, address: str) -> None:
        """Do what `Worker.run` does."""
        self._record = WorkerRecord(
            self._identity.name, self.incarnation, self._identity.host, address, "cpu", world.pid(process)
        )
        self._registration = Registration(self._store, self._keys, self._record, clock=world.loop.time)

        async def serve(end: End) -> None:
            first = await end.get()
            if isinstance(first, shard_pb2.FormRequest | shard_pb2.PendingRequest):
                is_form = isinstance(first, shard_pb2.FormRequest)
                try:
                    answer = self._forming.answer(first) if is_form else self._service.pending(first)
                    world.net.send(end, answer)
                except PhalanxError as error:
                    world.net.send(end, error)
                return
            end.inbox.put_nowait(first)
            call = asyncio.ensure_future(
                self._service.Serve(None, _Context(world, end))  # type: ignore[arg-type]
            )
            call.add_done_callback(lambda done: done.cancelled() or done.exception())  # retrieved, as in gRPC
            # As in gRPC, a call is cancelled when its client is gone.
            while not call.done() and not end.closed:
                await asyncio.sleep(0.05)
            call.cancel()

        world.net.listen(address, process, serve)
        async with asyncio.TaskGroup() as self._tasks:
            for work in (self._registration.run(), self._watch_store(), self._monitor.run()):
                self._tasks.create_task(work)

    async def leave(self, process: Process) -> None:
        """Do what `Worker.run` does once it is told to stop."""
        await self._drain(DRAIN_S)
        self._handle(Stop())
        await self._registration.close()
        process.die()


class World:
    """The cluster, and the view of it from outside."""

    def __init__(
        self, seed: int, *, replicas: int = 2, tp: int = 2, workers: int = 4, gateways: int = 2
    ) -> None:
        self.chance = random.Random(seed)
        self.loop = SimLoop()
        self.net = Network(self.loop, self.chance)
        self._frozen, self._frozen_since = 0.0, None
        self.store = MemoryStore(clock=lambda: self.loop.time() - self._frozen)
        self.store_away = False
        self.etcd = Process(self.loop, "etcd")
        self.children: dict[int, Process] = {}
        self.groups: dict[str, list[Any]] = {}
        self.schedulers: list[tuple[Process, Scheduler]] = []
        self.processes: dict[str, Process] = {}
        self.gateways: dict[str, Gateway] = {}
        self.workers: dict[str, SimWorker] = {}
        self.violations: list[str] = []
        self.events: list[str] = []
        self._boots = itertools.count(1)
        self._pids: dict[int, Process] = {}
        self.replicas, self.tp = replicas, tp
        self.worker_names = [f"worker{i}" for i in range(workers)]
        self.gateway_names = [f"gateway{i}" for i in range(gateways)]
        self.controller_names = ["controller0", "controller1"]
        self.skew: dict[str, float] = {}  # of controllers' wall clocks, in seconds

    def pid(self, process: Process) -> int:
        """A number for a process."""
        self._pids[len(self._pids) + 1] = process
        return len(self._pids)

    def note(self, what: str) -> None:
        """Add to the run's list of events."""
        self.events.append(f"{self.loop.time() - 1000:.3f} {what}")

    async def start(self) -> None:
        """Boot everything."""
        smaller = tuple(LayoutRecord(*size) for size in smaller_sizes(self.tp, 1))
        deployment = DeploymentRecord("d", 1, "/model", self.replicas, self.tp, 1, fallbacks=smaller)
        await self.store.txn([], [Put(KEYS.deployment("d"), encode(deployment))])
        for name in self.worker_names:
            self.boot_worker(name)
        for name in self.gateway_names:
            self.boot_gateway(name)
        for name in self.controller_names:
            self.boot_controller(name)
        self._expiring = self.loop.create_task(self._expire())

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if not self.store_away:
                self.store.expire()

    def _process(self, name: str) -> Process:
        process = self.processes[name] = Process(self.loop, name)
        return process

    def boot_worker(self, name: str) -> None:
        """Start a worker, or start it again."""
        process = self._process(name)
        address = f"{name}:{next(self._boots)}"
        identity = Identity(name, name, "cpu", "", KEYS.cluster)
        worker = process.context.run(SimWorker, identity, SimStore(self, process))
        worker.incarnation = worker._supervisor._incarnation = address
        self.workers[name] = worker
        process.start(worker.live(self, process, address))

    def boot_gateway(self, name: str) -> None:
        """Start a gateway, or start it again."""
        process = self._process(name)
        incarnation = f"{name}:{next(self._boots)}"
        store = SimStore(self, process)
        gateway = self.gateways[name] = process.context.run(Gateway, name, incarnation, store, KEYS)
        record = GatewayRecord(name, incarnation, name, name, name, self.pid(process))
        registration = Registration(store, KEYS, record, clock=self.loop.time)

        async def serve(end: End) -> None:
            with contextlib.suppress(ConnectionError):
                await self._answer(gateway, end)

        self.net.listen(name, process, serve)
        process.start(gateway.run())
        process.start(registration.run())

    def boot_controller(self, name: str) -> None:
        """Start a controller, or start it again."""
        process = self._process(name)
        store = SimStore(self, process)
        view = View(store, KEYS)
        process.start(view.follow())
        record = ControllerRecord(name, name)

        def clock() -> float:
            return self.loop.time() + self.skew.get(name, 0.0)

        process.start(active_controller.run(store, KEYS, view, record, clock=clock))

    def store_goes(self, *, frozen: bool) -> None:
        """Make the store unreachable. With `frozen`, its leases do not expire meanwhile."""
        self.store_away = True
        self._frozen_since = self.loop.time() if frozen else None

    def store_comes(self) -> None:
        """The store is back."""
        self.store_away = False
        if self._frozen_since is not None:
            self._frozen += self.loop.time() - self._frozen_since

    async def _answer(self, gateway: Gateway, end: End) -> None:
        """Answer one call of a client, as `dataplane.gateway.server` does."""
        request = await end.get()
        answering = asyncio.ensure_future(self._events(gateway, request, end))
        try:
            while not answering.done() and not end.closed:
                with contextlib.suppress(ConnectionError):
                    await end.get()  # a client sends nothing more: this waits for its end
                end.closed = True
        finally:
            answering.cancel()

    async def _events(self, gateway: Gateway, request: Any, end: End) -> None:
        try:
            async for event in self._stream(gateway, request):
                self.net.send(end, event)
        except PhalanxError as error:
            self.net.close(end, error)
        else:
            self.net.close(end, "done")

    async def _stream(self, gateway: Gateway, request: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        if isinstance(request, inference_pb2.ResumeRequest):
            ticket = Ticket.parse(request.resume_token)
            async with gateway.resume(ticket) as live:
                async for event in gateway_server._events(live, ticket.cursor(request.cursor)):
                    yield event
            return
        journal = journal_for(request)
        async with gateway.request(journal) as live:
            await live.accepted()
            async for event in gateway_server._events(live, journal.start):
                yield event

    # From outside

    @contextlib.contextmanager
    def watched(self, stream: SimReplicaStream, frame: shard_pb2.StepFrame) -> Iterator[None]:
        """Check one frame at a gateway: it must be dropped if its epoch is not the one the gateway knows."""
        counters = self.gateways[stream.gateway].dispatcher.counters
        dropped = counters.stale_frames_dropped
        yield
        if frame.epoch != stream.target.epoch and counters.stale_frames_dropped == dropped:
            self.violations.append(
                f"{stream.gateway} took a frame of epoch {frame.epoch} for {stream.target}"
            )

    @property
    def snapshot(self) -> Snapshot:
        """The cluster's state in the store."""
        return Snapshot.of(self.store._listing(KEYS.root), KEYS)

    def is_whole(self) -> bool:
        """Whether the cluster is what its deployment asks for, and every gateway reaches all replicas."""
        snapshot = self.snapshot
        names = [f"d-{i}" for i in range(self.replicas)]
        if sorted(snapshot.replicas) != names:
            return False
        for name in names:
            shards = [snapshot.shard(name, rank) for rank in range(self.tp)]
            if not all(shard is not None and shard.state == 2 for shard in shards):
                return False
        epochs = {name: snapshot.replicas[name].epoch for name in names}
        return all(self.gateways[name].dispatcher.router.connected == epochs for name in self.gateway_names)

    def end(self) -> None:
        """Kill every process of this world."""
        for process in [*self.processes.values(), *self.children.values()]:
            process.alive = False
