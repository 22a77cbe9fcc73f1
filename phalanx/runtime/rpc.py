"""gRPC with the options of every Phalanx process, health, reflection, and errors on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from phalanx.runtime.errors import DOMAIN, PhalanxError
from phalanx.v1 import types_pb2

MAX_MESSAGE_BYTES = 32 << 20
_DETAILS = "grpc-status-details-bin"
_RETRY_AFTER_S = 1
# gRPC sends an error as headers of at most 8 KiB: the message percent-encoded (up to 3 bytes per byte), and
# again in the details. Longer headers reach the client as RESOURCE_EXHAUSTED, so it would retry for nothing.
_MAX_ERROR_BYTES = 1500
# The reason for a status that comes from gRPC itself, without ErrorInfo.
_REASONS = {
    grpc.StatusCode.CANCELLED: "CANCELLED",
    grpc.StatusCode.DEADLINE_EXCEEDED: "DEADLINE_EXCEEDED",
    grpc.StatusCode.INVALID_ARGUMENT: "INVALID_ARGUMENT",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "OVERLOADED",
    grpc.StatusCode.UNAVAILABLE: "UNREACHABLE",
    grpc.StatusCode.UNIMPLEMENTED: "UNSUPPORTED",
}

_MESSAGES = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
# Client and server must agree on the ping rate, or the server disconnects the client with `too_many_pings`.
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER = [
    ("grpc.so_reuseport", 0),  # otherwise a second server binds the same port without an error
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
]
# Reconnect at once to a peer that restarts on the same port. gRPC's default back-off grows from 1 s to 120 s,
# so a client could still wait for a peer that serves again.
_CLIENT = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 400),
]


class Health(Protocol):
    """The health service (grpc.health.v1) of a server."""

    async def set(self, service: str, status: Any) -> None:
        """Set the `HealthCheckResponse.ServingStatus` of a service; the service "" is the whole process."""


def server() -> grpc.aio.Server:
    """A server with Phalanx's limits and keepalive. Add services, then `bind` it."""
    return grpc.aio.server(options=_MESSAGES + _KEEPALIVE + _SERVER)


def bind(server: grpc.aio.Server, address: str) -> str:
    """Listen on `host:port`, where port 0 picks a free one; returns the address in use.

    Raises:
        OSError: the address is in use or not available.
    """
    host = address.rpartition(":")[0]
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from error
    return f"{host}:{port}"


def channel(target: str) -> grpc.aio.Channel:
    """A channel to `host:port` with Phalanx's limits and keepalive."""
    return grpc.aio.insecure_channel(target, options=_MESSAGES + _KEEPALIVE + _CLIENT)


def add_health_and_reflection(server: grpc.aio.Server, services: Sequence[str]) -> Health:
    """Add grpc.health.v1 and reflection for `services` (full names) to the server.

    The returned servicer sets the health of each service.
    """
    servicer: Health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stubs lack aio
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    return servicer


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: PhalanxError) -> NoReturn:
    """End a call with an error that carries ErrorInfo, and RetryInfo if the error is retryable."""
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if error.retryable:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=_RETRY_AFTER_S)))
    message = _shortened(error.message)
    status = status_pb2.Status(code=error.code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    await context.abort(error.code, message, ((_DETAILS, status.SerializeToString()),))
    raise AssertionError("abort returned")


def _shortened(message: str) -> str:
    content = message.encode()
    if len(content) <= _MAX_ERROR_BYTES:
        return message
    return content[:_MAX_ERROR_BYTES].decode(errors="ignore") + "..."


def to_error(error: grpc.aio.AioRpcError) -> PhalanxError:
    """The error that a peer sent by `abort`, or the closest error for a plain gRPC status."""
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == _DETAILS:
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == DOMAIN:
                    return PhalanxError(info.reason, error.details() or "")
    return PhalanxError(_REASONS.get(error.code(), "INTERNAL"), error.details() or error.code().name)


def to_message(error: PhalanxError) -> types_pb2.Error:
    """The error as a field of a frame."""
    return types_pb2.Error(
        reason=error.reason, message=error.message, retryable=error.retryable, code=error.code.value[0]
    )


def from_message(message: types_pb2.Error) -> PhalanxError:
    """The error in a frame."""
    return PhalanxError(message.reason, message.message, retryable=message.retryable)


async def set_serving(health: Health, services: Sequence[str], serving: bool = True) -> None:
    """Set the health of services (full names; "" is the whole process) to serving or not serving."""
    status = health_pb2.HealthCheckResponse
    for service in services:
        await health.set(service, status.SERVING if serving else status.NOT_SERVING)
