"""Waiting for child processes: reads their pipes, runs one to its end, polls etcd's health."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence

_ETCD_POLL_S = 0.05


@contextlib.asynccontextmanager
async def reading(fd: int) -> AsyncIterator[asyncio.StreamReader]:
    """Read from a pipe, and close it on exit.

    The transport closes the descriptor. If other code closed it, the event loop would continue to poll its
    number, and would mix up this pipe with the next one that gets the same number.
    """
    reader = asyncio.StreamReader()
    pipe = os.fdopen(fd, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), pipe
    )
    try:
        yield reader
    finally:
        transport.close()


async def run_bounded(line: Sequence[str], timeout_s: float) -> int:
    """Run a command; returns its exit code. After `timeout_s` seconds kills it and raises TimeoutError."""
    child = await asyncio.create_subprocess_exec(*line, stdin=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(timeout_s):
            return await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def wait_for_etcd(address: str, child: asyncio.subprocess.Process) -> dict[str, str] | None:
    """Wait until an etcd passes its health check; returns its address, or None when the process has ended.

    Uses plain HTTP: the supervisor process forks others, so it must not have gRPC's threads.
    """
    host, _, port = address.partition(":")
    while child.returncode is None:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"GET /health HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            if b'"health":"true"' in answer:
                return {"grpc": address}
        await asyncio.sleep(_ETCD_POLL_S)
    return None
