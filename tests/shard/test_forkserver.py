"""The fork server with real engines: they are forked, end as processes do, and never outlive the server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dataplane.shard.launch import ForkServer
from dataplane.shard.process import Child
from engine.config import EngineConfig
from engine.ipc.wire import EngineFailed, Message, StartEngine
from tests.until import until

ENGINE = (sys.executable, "-m", "engine.processes.rank")
NOWHERE = StartEngine(EngineConfig("/nonexistent"))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


class Engine:
    """An engine that waits for its first message."""

    def __init__(self, server: ForkServer, **sockets: socket.socket) -> None:
        self.pids: list[int] = []
        self.said: list[Message] = []
        self.child = Child(
            ENGINE,
            NOWHERE,
            on_spawned=self.pids.append,
            on_message=self.said.append,
            launch=server.launch,
            sockets={f"--{name}-fd": each for name, each in sockets.items()},
        )
        self.child._pending = []
        self.task = asyncio.create_task(self.child.run())

    async def started(self) -> int:
        await until(lambda: self.pids, deadline_s=60)
        return self.pids[0]


@pytest.fixture
async def server() -> AsyncIterator[ForkServer]:
    server = ForkServer((sys.executable, "-m", "engine.processes.forkserver"))
    running = asyncio.create_task(server.run())
    yield server
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_engines_are_forked_and_end_as_processes_do(server: ForkServer) -> None:
    one, other, third = Engine(server), Engine(server), Engine(server)
    first, second, last = await one.started(), await other.started(), await third.started()
    assert parent_of(first) == parent_of(second) == parent_of(last) != os.getpid()
    os.kill(first, signal.SIGKILL)
    assert await one.task == "was killed by SIGKILL"
    other.child.send(NOWHERE)
    assert await other.task == "exited with code 1"
    (failed,) = [said for said in other.said if isinstance(said, EngineFailed)]
    assert failed.permanent
    third.child.kill()
    assert await third.task == "was killed by SIGKILL"
    assert not lives(last)


async def test_a_forked_engine_has_its_socket_to_the_text_process_alone(server: ForkServer) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        engine, other = Engine(server, text=theirs), Engine(server)
        pid, _ = await engine.started(), await other.started()
        assert theirs.fileno() == -1, "the worker has closed its copy"
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
        os.kill(pid, signal.SIGKILL)
        await engine.task
        assert ours.recv(1) == b"", "nobody else holds the other end"
        other.child.kill()
        await other.task


async def test_a_fork_server_that_dies_takes_its_engines_along_and_comes_back(server: ForkServer) -> None:
    engine = Engine(server)
    pid = await engine.started()
    dead = parent_of(pid)
    os.kill(dead, signal.SIGKILL)
    assert await engine.task == "was killed by SIGKILL"
    await until(lambda: not lives(pid))
    again = Engine(server)
    assert parent_of(await again.started()) not in (dead, os.getpid())
    again.child.kill()
    await again.task
