"""The one stream between this gateway and a replica's leader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from dataplane.gateway.router import Target
from phalanx.internal.v1 import shard_pb2, shard_pb2_grpc
from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError


class ReplicaStream:
    """One call: `run` opens it, `send` queues requests, `close` ends it.

    Owns: the channel and the call.
    Does not own: the meaning of frames (`dispatcher`), whether the stream is opened again (`replicas`).
    """

    def __init__(self, target: Target, hello: shard_pb2.GatewayHello) -> None:
        self.target = target
        self._hello = hello
        self._closed = "the stream was closed"
        self._outbox: asyncio.Queue[shard_pb2.ServeRequest] = asyncio.Queue()
        self._call: grpc.aio.StreamStreamCall[shard_pb2.ServeRequest, shard_pb2.ServeResponse] | None = None

    def send(self, request: shard_pb2.ServeRequest) -> None:
        """Queue a request. It is dropped if the stream breaks before it is written."""
        self._outbox.put_nowait(request)

    def close(self, reason: str) -> None:
        """End the call from this side. `run` returns `reason`."""
        self._closed = reason
        if self._call is not None:
            self._call.cancel()

    async def run(
        self,
        on_hello: Callable[[shard_pb2.LeaderHello], None],
        on_frame: Callable[[shard_pb2.StepFrame], None],
    ) -> PhalanxError:
        """Open the call and pass on what arrives until it ends. Returns why it ended."""
        async with rpc.channel(self.target.address) as channel:
            stub = shard_pb2_grpc.ShardServiceStub(channel)
            self._call = call = stub.Serve()  # type: ignore[call-arg]  # the stubs demand an iterator
            writer: asyncio.Task[None] | None = None
            try:
                await call.write(shard_pb2.ServeRequest(hello=self._hello))
                writer = asyncio.create_task(self._write(call))
                # No timeout around a read: a cancelled read leaks (grpc#43360).
                async for response in call:
                    if response.WhichOneof("frame") == "hello":
                        on_hello(response.hello)
                    else:
                        on_frame(response.step)
                return PhalanxError("UNREACHABLE", "the leader closed the stream")
            except grpc.aio.AioRpcError as error:
                return rpc.to_error(error)
            except asyncio.CancelledError:
                # gRPC raises this when `close` cancels the call, asyncio when this task is cancelled. Raise
                # it again only for the task.
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
                return PhalanxError("UNREACHABLE", self._closed)
            finally:
                call.cancel()
                if writer is not None:
                    writer.cancel()
                    await asyncio.gather(writer, return_exceptions=True)

    async def _write(
        self, call: grpc.aio.StreamStreamCall[shard_pb2.ServeRequest, shard_pb2.ServeResponse]
    ) -> None:
        while True:
            try:
                await call.write(await self._outbox.get())
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # `run` sees the same end and returns the reason
