"""Calls from one worker to another."""

from __future__ import annotations

from typing import Any

import grpc

from phalanx.internal.v1 import shard_pb2, shard_pb2_grpc
from phalanx.runtime import rpc

_TIMEOUT_S = 2.0


async def ask_to_start(address: str, request: shard_pb2.FormRequest) -> shard_pb2.FormResponse:
    """Ask a worker for its rank of a replica's next life. Raises PhalanxError."""
    answer: shard_pb2.FormResponse = await _call(address, "Form", request)
    return answer


async def ask_pending(address: str, request: shard_pb2.PendingRequest) -> int:
    """Ask a leader how many requests its replica has. Raises PhalanxError."""
    answer: shard_pb2.PendingResponse = await _call(address, "Pending", request)
    return answer.requests


async def _call(address: str, method: str, request: object) -> Any:
    async with rpc.channel(address) as channel:
        try:
            return await getattr(shard_pb2_grpc.ShardServiceStub(channel), method)(
                request, timeout=_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise rpc.to_error(error) from error
