"""Calls that commands make to a controller or a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from phalanx.cli import cluster
from phalanx.cli.failure import FAILED, NOT_FOUND, UNREACHABLE, Failure
from phalanx.cli.local import processes

T = TypeVar("T")
DEADLINE_S = 10.0
_PAGE_SIZE = 1000  # the maximum of a server


def controller_of(state_dir: Path, override: str | None) -> str:
    """host:port of the controller. Raises Failure when the state directory names none."""
    return override or _cluster(state_dir).controller


def gateways_of(state_dir: Path, override: str | None) -> list[str]:
    """host:port of each gateway's gRPC server. Raises Failure when the state directory names none."""
    if override:
        return override.split(",")
    return [gateway.grpc for gateway in _cluster(state_dir).gateways]


def _cluster(state_dir: Path) -> cluster.Cluster:
    found = cluster.read(state_dir)
    if found is None:
        raise Failure(f"nothing is running in {state_dir}; start it with `phalanx up`", UNREACHABLE)
    if not processes.pids(state_dir.resolve()):
        raise Failure(f"the cluster of {state_dir} is gone; start it anew with `phalanx up`", UNREACHABLE)
    return found


def call(target: str, use: Callable[[Any], Awaitable[T]]) -> T:
    """Run `use` with a ControlService stub of the controller at `target`; a failed call raises Failure."""

    async def connected() -> T:
        from phalanx.runtime import rpc
        from phalanx.v1 import control_pb2_grpc

        async with rpc.channel(target) as channel:
            return await use(control_pb2_grpc.ControlServiceStub(channel))

    return run(target, connected())


def run(target: str, work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that calls `target`; a failed call raises Failure."""
    import grpc

    from phalanx.runtime.errors import PhalanxError

    try:
        return asyncio.run(work)
    except grpc.aio.AioRpcError as error:
        raise refusal(target, error.code(), error.details() or error.code().name) from error
    except PhalanxError as error:
        code = grpc.StatusCode.UNAVAILABLE if error.reason == "UNREACHABLE" else error.code
        raise refusal(target, code, error.message) from error


async def every(method: Callable[..., Any], request: Any, items: str, **options: Any) -> AsyncIterator[Any]:
    """All items of a list method, page by page. `items` names their field in the response.

    `options` go to each call. Changes `request`.
    """
    request.page_size = _PAGE_SIZE
    while True:
        response = await method(request, **options)
        for item in getattr(response, items):
            yield item
        if not response.next_page_token:
            return
        request.page_token = response.next_page_token


def refusal(target: str, code: Any, message: str) -> Failure:
    """The Failure to show for a call that ended with a gRPC status."""
    import grpc

    match code:
        case grpc.StatusCode.NOT_FOUND:
            return Failure(message, NOT_FOUND)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
            return Failure(f"no answer from {target}: {message}", UNREACHABLE)
        case _:
            return Failure(message, FAILED)
