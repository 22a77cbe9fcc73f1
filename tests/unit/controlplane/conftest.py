"""A controller's API over a real socket, on a MemoryStore."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import grpc
import pytest

from controlplane.server import SERVICE, ControlService
from controlplane.view import View
from engine.weights.model_config import ModelConfig
from engine.weights.safetensors_header import write_header
from engine.weights.tensors import tensor_shapes
from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError
from phalanx.store.interface import Operation, Put, StoreUnavailableError
from phalanx.store.keys import Keys
from phalanx.store.memory import MemoryStore
from phalanx.store.records import WorkerRecord, encode
from phalanx.v1 import control_pb2, control_pb2_grpc

KEYS = Keys()


class Fragile(MemoryStore):
    """A store that can be unreachable, and in which another write can come before a transaction."""

    away = False
    overtaken_by: Operation | None = None  # written before the next transaction

    async def get(self, key: str):  # type: ignore[no-untyped-def]
        if self.away:
            raise StoreUnavailableError("the store is away")
        return await super().get(key)

    async def txn(self, guards, operations):  # type: ignore[no-untyped-def]
        faster, self.overtaken_by = self.overtaken_by, None
        if faster is not None:
            await super().txn([], [faster])
        return await super().txn(guards, operations)


class Controller:
    """The store, the view and a client of one ControlService."""

    def __init__(self) -> None:
        self.store = Fragile()
        self.view = View(self.store, KEYS)
        self.channel: grpc.aio.Channel
        self.stub: control_pb2_grpc.ControlServiceAsyncStub

    async def apply(self, **spec: object) -> control_pb2.ApplyDeploymentResponse:
        return await self.request(**spec)

    async def refused(self, **spec: object) -> PhalanxError:
        return await refusal(self.apply(**spec))

    async def request(
        self, *, etag: str = "", validate_only: bool = False, **spec: object
    ) -> control_pb2.ApplyDeploymentResponse:
        """Apply with the options of the request."""
        message = control_pb2.DeploymentSpec(**{"name": "a", "model": "/models/one", **spec})  # type: ignore[arg-type]
        request = control_pb2.ApplyDeploymentRequest(spec=message, etag=etag, validate_only=validate_only)
        return await self.stub.ApplyDeployment(request, timeout=10)

    async def delete(self, *, etag: str = "", validate_only: bool = False) -> None:
        request = control_pb2.DeleteDeploymentRequest(name="a", etag=etag, validate_only=validate_only)
        await self.stub.DeleteDeployment(request, timeout=10)

    async def join(self, *workers: str) -> None:
        """Register workers, and wait until the view has them."""
        revision = await self.store.txn(
            [],
            [
                Put(KEYS.worker(name), encode(WorkerRecord(name, "boot", "host", f"{name}:1", "cpu", 1)))
                for name in workers
            ],
        )
        assert revision is not None
        await self.view.reached(revision)


async def refusal(call: Awaitable[object]) -> PhalanxError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    error = rpc.to_error(failure.value)
    assert error.code is failure.value.code()
    return error


@pytest.fixture
async def controller() -> AsyncIterator[Controller]:
    served = Controller()
    server = rpc.server()
    control_pb2_grpc.add_ControlServiceServicer_to_server(
        ControlService(served.store, KEYS, served.view), server
    )
    rpc.add_health_and_reflection(server, [SERVICE])
    address = rpc.bind(server, "127.0.0.1:0")
    await server.start()
    async with asyncio.TaskGroup() as tasks, rpc.channel(address) as channel:
        following = tasks.create_task(served.view.follow())
        await served.view.newer(None)
        served.channel, served.stub = channel, control_pb2_grpc.ControlServiceStub(channel)
        yield served
        following.cancel()
        await server.stop(None)
    await served.store.close()


def model_dir(path: Path, *, weights: bool) -> str:
    """A Llama directory with 4 heads; its weights are a hole in a file."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    }
    (path / "config.json").write_text(json.dumps(config))
    if weights:
        shapes = tensor_shapes(ModelConfig.load(path))
        file = path / "model.safetensors"
        write_header(file, [(name, "F32", shape) for name, shape in shapes.items()])
        with file.open("ab") as data:
            data.truncate(data.tell() + sum(4 * math.prod(shape) for shape in shapes.values()))
    return str(path)
