"""ShardService: the streams of gateways, and the calls of other workers.

Owns: the gRPC side of each stream.
Does not own: what the frames mean (`leader`, `requests`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from dataplane.shard.leader import Leader
from dataplane.shard.outbox import Outbox
from phalanx.internal.v1 import shard_pb2, shard_pb2_grpc
from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError

SERVICE = "phalanx.internal.v1.ShardService"

log = logging.getLogger(__name__)

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # its stubs lack it

Context = grpc.aio.ServicerContext[shard_pb2.ServeRequest, shard_pb2.ServeResponse]


class ShardServer(shard_pb2_grpc.ShardServiceServicer):
    """Connects gateways to the current leader, if any. `form` answers the leaders of other ranks."""

    def __init__(self, worker: str, form: Callable[[shard_pb2.FormRequest], shard_pb2.FormResponse]) -> None:
        self._worker, self._form = worker, form
        self._numbers = itertools.count(1)
        self.leader: Leader | None = None

    async def Serve(  # type: ignore[override]  # reads and writes by its context; N802 names the RPC
        self, request_iterator: AsyncIterator[shard_pb2.ServeRequest], context: Context
    ) -> None:
        """One gateway's stream, from its hello to the end of either side."""
        first: Any = await context.read()
        try:
            leader = self._admit(first)
        except PhalanxError as error:
            await rpc.abort(context, error)
        stream = next(self._numbers)
        outbox = leader.join(stream, first.hello.incarnation)
        reader = asyncio.create_task(self._listen(context, leader, stream, outbox))
        try:
            await context.write(shard_pb2.ServeResponse(hello=leader.hello))
            while (frame := await outbox.get()) is not None:
                await context.write(shard_pb2.ServeResponse(step=frame))
            if outbox.error is not None:
                await rpc.abort(context, outbox.error)
        finally:
            leader.leave(stream)
            # Do not cancel the reader: gRPC leaks a cancelled read. The read ends with the call.
            await asyncio.wait([reader])

    async def Form(
        self, request: shard_pb2.FormRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> shard_pb2.FormResponse:
        """Start this worker's rank of a replica's next life; its leader asks."""
        try:
            return self._form(request)
        except PhalanxError as error:
            await rpc.abort(context, error)

    async def Pending(
        self, request: shard_pb2.PendingRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> shard_pb2.PendingResponse:
        """How many requests the replica has that this worker leads."""
        try:
            return self.pending(request)
        except PhalanxError as error:
            await rpc.abort(context, error)

    def pending(self, request: shard_pb2.PendingRequest) -> shard_pb2.PendingResponse:
        """The answer to `Pending`. Raises PhalanxError: NOT_LEADER, for another replica or epoch."""
        leader = self.leader
        if leader is None or (leader.replica, leader.epoch) != (request.replica, request.epoch):
            message = f"{self._worker} does not lead {request.replica} in epoch {request.epoch}"
            raise PhalanxError("NOT_LEADER", message)
        return shard_pb2.PendingResponse(requests=leader.pending)

    def _admit(self, first: Any) -> Leader:
        if first is _EOF or first.WhichOneof("frame") != "hello":
            raise PhalanxError("INVALID_ARGUMENT", "a stream begins with a GatewayHello")
        hello, leader = first.hello, self.leader
        if leader is None or leader.replica != hello.replica:
            raise PhalanxError("NOT_LEADER", f"{self._worker} is not the ready leader of {hello.replica}")
        if leader.epoch != hello.epoch:
            message = f"{hello.replica} is in epoch {leader.epoch}, not {hello.epoch}"
            raise PhalanxError("STALE_EPOCH", message)
        log.info("gateway joined", extra={"gateway": hello.gateway, "replica": hello.replica})
        return leader

    async def _listen(self, context: Context, leader: Leader, stream: int, outbox: Outbox) -> None:
        """Read a stream's commands until either side ends it."""
        try:
            while True:
                request: Any = await context.read()
                if request is _EOF:
                    outbox.close()
                    return
                leader.command(stream, request)
        except PhalanxError as error:
            outbox.close(error)
        except grpc.aio.AbortError:
            return  # this side has ended the call
        except Exception:
            # End the stream, or the gateway goes on sending to a stream without a reader.
            log.exception("a stream's reader failed", extra={"replica": leader.replica})
            outbox.close(PhalanxError("INTERNAL", "the leader failed on a command"))
