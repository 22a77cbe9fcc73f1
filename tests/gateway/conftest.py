from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Self

import aiohttp
import grpc
import pytest
from aiohttp import web

from dataplane.gateway.gateway import Gateway
from dataplane.gateway.http import application
from dataplane.gateway.server import InferenceService
from phalanx.client import Client
from phalanx.runtime import rpc
from phalanx.store.interface import Put
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
from phalanx.v1 import inference_pb2_grpc
from tests.gateway.leader import TestLeader
from tests.until import until

KEYS = Keys("test")
DEPLOYMENT = DeploymentRecord("demo", 1, "/models/demo", replicas=2)


@dataclass
class Running:
    """A real gateway with HTTP and gRPC on loopback."""

    gateway: Gateway
    address: str
    url: str
    server: grpc.aio.Server
    runner: web.AppRunner
    task: asyncio.Task[None]

    @classmethod
    async def start(cls, name: str, store: MemoryStore) -> Self:
        gateway = Gateway(name, f"incarnation of {name}", store, KEYS)
        server = rpc.server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(gateway), server)
        address = rpc.bind(server, "127.0.0.1:0")
        await server.start()
        runner = web.AppRunner(
            application(gateway), handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        task = asyncio.create_task(gateway.run())
        await until(lambda: "demo" in gateway.snapshot.deployments)
        return cls(gateway, address, f"http://127.0.0.1:{runner.addresses[0][1]}", server, runner, task)

    async def kill(self) -> None:
        """Die without ending any request. Idempotent."""
        self.gateway._leaving = True  # a dead process cancels nothing
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        await self.server.stop(None)
        await self.runner.cleanup()


@dataclass
class Rig:
    """A gateway over a memory store and leaders with a model made of arithmetic, and its client."""

    store: MemoryStore
    gateway: Gateway
    url: str
    client: Client
    first: Running
    leaders: list[TestLeader] = field(default_factory=list)

    async def add_leader(self, replica: str, *, wait: bool = True, **options: object) -> TestLeader:
        """A replica joins, or joins again under a new epoch; returns when the gateway reaches it."""
        bare = AssignmentRecord(replica, DEPLOYMENT, (MemberRecord("w", "i", "127.0.0.1:1"),))
        epoch = await self.store.txn([], [Put(KEYS.assignment(replica), encode(bare))])
        assert epoch is not None
        # Only now is the epoch known. The assignment must carry the leader's address, so write it again.
        leader = TestLeader(replica, epoch + 1, **options)
        await leader.start()
        self.leaders.append(leader)
        member = MemberRecord("w", "i", leader.address)
        await self.store.txn(
            [], [Put(KEYS.assignment(replica), encode(AssignmentRecord(replica, DEPLOYMENT, (member,))))]
        )
        shard = ShardRecord(replica, 0, epoch + 1, "w", "i", ShardState.READY)
        await self.store.txn([], [Put(KEYS.shard(replica, 0), encode(shard))])
        if wait:
            await until(lambda: self.gateway.dispatcher.router.connected.get(replica) == epoch + 1)
        return leader


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    store = MemoryStore()
    await store.txn([], [Put(KEYS.deployment("demo"), encode(DEPLOYMENT))])
    first = await Running.start("gateway-0", store)
    async with Client(first.address) as client:
        rig = Rig(store, first.gateway, first.url, client, first)
        yield rig
        first.gateway.dispatcher.check_integrity()
    await first.kill()
    for leader in rig.leaders:
        leader.check_integrity()
        await leader.kill()
    await store.close()


@pytest.fixture
async def http(rig: Rig) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(rig.url) as session:
        yield session
