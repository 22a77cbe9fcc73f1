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
    """One life of the stream: `run` opens it, `send` queues frames, `close` ends it.

    Owns: the channel and the call. Does not own: what frames mean, or whether to open it again.
    """

    def __init__(self, target: Target, hello: shard_pb2.GatewayHello) -> None:
        self.target = target
        self._hello = hello
        self._closed = "the stream was closed"
        self._outbox: asyncio.Queue[shard_pb2.ServeRequest] = asyncio.Queue()
        self._call: grpc.aio.StreamStreamCall[shard_pb2.ServeRequest, shard_pb2.ServeResponse] | None = None

    def send(self, frame: shard_pb2.ServeRequest) -> None:
        """Queue a frame; it is dropped if the stream breaks first."""
        self._outbox.put_nowait(frame)

    def close(self, reason: str) -> None:
        """End the stream from this side. `reason` is what `run` returns."""
        self._closed = reason
        if self._call is not None:
            self._call.cancel()

    async def run(
        self,
        on_hello: Callable[[shard_pb2.LeaderHello], None],
        on_frame: Callable[[shard_pb2.StepFrame], None],
    ) -> PhalanxError:
        """Open the stream and hand up what arrives until it breaks; returns why it did."""
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
                # Raised for a call that was cancelled by `close` as well as for a cancelled task.
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
                return  # the reader meets the same end and says why
