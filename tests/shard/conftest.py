"""A cluster of workers in this process, with fake or real children, a memory store and loopback gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dataplane.shard.children import Commands
from dataplane.shard.worker import Identity, Worker
from phalanx.internal.v1 import shard_pb2, shard_pb2_grpc
from phalanx.runtime import rpc
from phalanx.store.interface import Delete, Put
from phalanx.store.keys import Keys
from phalanx.store.memory import MemoryStore
from phalanx.store.records import (
    AssignmentRecord,
    DeploymentRecord,
    MemberRecord,
    ShardRecord,
    ShardState,
    encode,
)
from phalanx.store.snapshot import Snapshot

HERE = Path(__file__).parent
FAKES = Commands(
    engine=(sys.executable, "-S", str(HERE / "fake_engine.py")),
    text=(sys.executable, "-S", str(HERE / "fake_text.py")),
)
DEADLINE_S = 10.0


class Gateway:
    """One stream to a worker, as a gateway opens it."""

    def __init__(self, address: str, replica: str, epoch: int, name: str = "gateway-0") -> None:
        self._channel = rpc.channel(address)
        self.call = shard_pb2_grpc.ShardServiceStub(self._channel).Serve()  # type: ignore[call-arg]
        self._hello = shard_pb2.GatewayHello(
            gateway=name, incarnation=uuid.uuid4().hex, replica=replica, epoch=epoch
        )
        self.seen: list[shard_pb2.StepFrame] = []

    async def __aenter__(self) -> Gateway:
        await self.call.write(shard_pb2.ServeRequest(hello=self._hello))
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.call.cancel()
        await self._channel.close()

    async def hello(self) -> shard_pb2.LeaderHello:
        async with asyncio.timeout(DEADLINE_S):
            response = await self.call.read()
        assert response.WhichOneof("frame") == "hello"
        return response.hello

    async def submit(self, request_id: str = "r", attempt: int = 1, **fields: object) -> None:
        fields = {"n": 1, "stopping": {"max_tokens": 4}} | fields
        submit = shard_pb2.Submit(request_id=request_id, attempt=attempt, **fields)  # type: ignore[arg-type]
        await self.call.write(shard_pb2.ServeRequest(submit=submit))

    async def cancel(self, request_id: str = "r", attempt: int = 1) -> None:
        cancel = shard_pb2.CancelAttempt(request_id=request_id, attempt=attempt)
        await self.call.write(shard_pb2.ServeRequest(cancel=cancel))

    async def until(self, condition: Callable[[shard_pb2.StepFrame], bool]) -> list[shard_pb2.StepFrame]:
        """The frames up to the first that meets the condition."""
        frames: list[shard_pb2.StepFrame] = []
        async with asyncio.timeout(DEADLINE_S):
            while True:
                response = await self.call.read()
                assert response.WhichOneof("frame") == "step", response
                frames.append(response.step)
                if condition(response.step):
                    self.seen += frames
                    return frames

    async def until_finished(self, request_id: str = "r", choices: int = 1) -> list[shard_pb2.Delta]:
        """The deltas of a request until all its choices have ended."""
        ended: set[int] = set()

        def over(frame: shard_pb2.StepFrame) -> bool:
            ended.update(
                delta.choice
                for delta in frame.deltas
                if delta.request_id == request_id and delta.finish_reason
            )
            return len(ended) == choices

        frames = await self.until(over)
        return [delta for frame in frames for delta in frame.deltas if delta.request_id == request_id]

    async def until_failed(self) -> shard_pb2.Failed:
        frames = await self.until(lambda frame: len(frame.failed) > 0)
        return frames[-1].failed[0]


class Cluster:
    """Plays the controller: assigns workers and looks at what they publish."""

    def __init__(self) -> None:
        self.store, self.keys = MemoryStore(), Keys()
        self.workers: dict[str, Worker] = {}
        self.addresses: dict[str, str] = {}
        self.stops: dict[str, asyncio.Event] = {}
        self.running: dict[str, asyncio.Task[None]] = {}

    @contextlib.asynccontextmanager
    async def worker(
        self, name: str = "worker-0", commands: Commands = FAKES, drain_s: float = 0.0
    ) -> AsyncIterator[Worker]:
        worker = Worker(Identity(name, "localhost", "cpu", "127.0.0.1:0"), self.store, commands)
        stop, listening = asyncio.Event(), asyncio.get_running_loop().create_future()
        running = asyncio.create_task(worker.run(stop, listening.set_result, drain_s))
        await asyncio.wait([running, listening], return_when=asyncio.FIRST_COMPLETED)
        self.workers[name], self.addresses[name] = worker, await listening
        self.stops[name], self.running[name] = stop, running
        try:
            yield worker
        finally:
            stop.set()
            async with asyncio.timeout(DEADLINE_S):
                await running

    async def assign(self, *names: str, model: str = "/m", replica: str = "d-0", pp: int = 1) -> int:
        """Form a replica of these workers in rank order; its epoch."""
        members = tuple(
            MemberRecord(name, self.workers[name].incarnation, self.addresses[name]) for name in names
        )
        deployment = DeploymentRecord("d", 1, model, tp=len(names) // pp, pp=pp, dtype="float32")
        record = AssignmentRecord(replica, deployment, members)
        revision = await self.store.txn([], [Put(self.keys.assignment(replica), encode(record))])
        assert revision is not None
        return revision

    async def dissolve(self, replica: str = "d-0") -> None:
        await self.store.txn([], [Delete(self.keys.assignment(replica))])

    async def until(self, condition: Callable[[Snapshot], bool], deadline_s: float = DEADLINE_S) -> Snapshot:
        async with asyncio.timeout(deadline_s):
            async for change in self.store.watch(self.keys.root):
                snapshot = Snapshot.of(change.listing, self.keys)
                if condition(snapshot):
                    return snapshot
        raise AssertionError("a watch ended")

    async def until_state(
        self, state: ShardState, rank: int = 0, replica: str = "d-0", deadline_s: float = DEADLINE_S
    ) -> ShardRecord:
        """The shard's record once it is in this state in the current epoch."""

        def reached(snapshot: Snapshot) -> bool:
            shard = snapshot.shard(replica, rank)
            return shard is not None and shard.state is state

        shard = (await self.until(reached, deadline_s)).shard(replica, rank)
        assert shard is not None
        return shard

    async def form(self, model: str = "/m") -> tuple[int, ShardRecord]:
        """A ready replica of worker-0 alone: its epoch and status."""
        epoch = await self.assign("worker-0", model=model)
        return epoch, await self.until_state(ShardState.READY)

    def gateway(self, epoch: int, worker: str = "worker-0", replica: str = "d-0") -> Gateway:
        return Gateway(self.addresses[worker], replica, epoch)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    yield cluster
    await cluster.store.close()
