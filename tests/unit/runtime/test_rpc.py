from __future__ import annotations

from typing import Any

import grpc
import pytest

from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import control_pb2, control_pb2_grpc


@pytest.mark.parametrize(
    ("reason", "code", "retryable"),
    [
        ("UNKNOWN_MODEL", grpc.StatusCode.NOT_FOUND, False),
        ("OVERLOADED", grpc.StatusCode.RESOURCE_EXHAUSTED, True),
    ],
)
async def test_an_error_crosses_the_wire_with_its_reason(
    reason: str, code: grpc.StatusCode, retryable: bool
) -> None:
    error = await sent(PhalanxError(reason, "naïve"))
    assert (error.reason, error.message, error.code, error.retryable) == (reason, "naïve", code, retryable)


@pytest.mark.parametrize("character", ["x", "é", "\U0001f600"])
async def test_a_long_message_is_shortened_and_keeps_its_status(character: str) -> None:
    """It may quote what a client sent. gRPC replaces a status with too long headers by another one."""
    error = await sent(PhalanxError("UNKNOWN_MODEL", "there is no model " + character * 100_000))
    assert (error.reason, error.code) == ("UNKNOWN_MODEL", grpc.StatusCode.NOT_FOUND)
    assert error.message.startswith("there is no model " + character * 100)
    assert error.message.endswith(character + "...")


async def sent(error: PhalanxError) -> PhalanxError:
    """The error as the client of a method gets it that ends with `error`."""
    server = rpc.server()

    async def refuse(request: Any, context: Any) -> None:
        await rpc.abort(context, error)

    handler = grpc.unary_unary_rpc_method_handler(
        refuse,
        control_pb2.ListWorkersRequest.FromString,
        control_pb2.ListWorkersResponse.SerializeToString,
    )
    generic = grpc.method_handlers_generic_handler("phalanx.v1.ControlService", {"ListWorkers": handler})
    server.add_generic_rpc_handlers((generic,))
    address = rpc.bind(server, "127.0.0.1:0")
    await server.start()
    async with rpc.channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await control_pb2_grpc.ControlServiceStub(channel).ListWorkers(control_pb2.ListWorkersRequest())
    await server.stop(0)
    received = rpc.to_error(caught.value)
    assert received.code is caught.value.code()
    return received


async def test_a_taken_port_is_refused_rather_than_shared() -> None:
    first, second = rpc.server(), rpc.server()
    address = rpc.bind(first, "127.0.0.1:0")
    with pytest.raises(OSError, match="cannot listen"):
        rpc.bind(second, address)
    await first.stop(0)


async def test_an_unreachable_peer_is_retryable() -> None:
    async with rpc.channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await control_pb2_grpc.ControlServiceStub(channel).ListWorkers(control_pb2.ListWorkersRequest())
    assert rpc.to_error(caught.value).reason == "UNREACHABLE"
    assert rpc.to_error(caught.value).retryable


def test_a_reason_that_nobody_knows_is_internal() -> None:
    assert PhalanxError("SURPRISE", "x").code is grpc.StatusCode.INTERNAL
