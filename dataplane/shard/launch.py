"""How a worker's children are started: as fresh processes, or forked by a server with all imports done."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

_READY_WITHIN_S = 120.0  # the imports take so long on a busy machine
_PAUSE_S = 1.0
_ANSWER = 64

log = logging.getLogger(__name__)


class Running(Protocol):
    """A process that was started."""

    @property
    def pid(self) -> int:
        """The process id."""

    @property
    def returncode(self) -> int | None:
        """Its exit code once it has ended, negative for a signal."""

    async def wait(self) -> int:
        """Its exit code, when it has ended."""

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""


Launch = Callable[[Sequence[str], Mapping[str, int]], Awaitable[Running]]
"""Starts a command that inherits descriptors, each named by an option: {"--fd": 7}. Raises OSError."""


class _Spawned:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid, self.wait = process.pid, process.wait

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def kill(self) -> None:
        # Not Popen.kill: it polls first and may reap the process before asyncio sees its exit code.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


async def spawn(command: Sequence[str], descriptors: Mapping[str, int]) -> Running:
    """Start a command as a fresh process."""
    options = [word for option, fd in descriptors.items() for word in (option, str(fd))]
    process = await asyncio.create_subprocess_exec(
        *command, *options, pass_fds=tuple(descriptors.values()), stdin=asyncio.subprocess.DEVNULL
    )
    return _Spawned(process)


class _Forked:
    """An engine that the fork server has forked. A pidfd, unlike a pid, never names another process later."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid, self._pidfd = pid, pidfd
        self.returncode: int | None = None
        self._over = asyncio.Event()

    async def wait(self) -> int:
        await self._over.wait()
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def ended(self, code: int) -> None:
        """The fork server, its parent, has reported its exit code."""
        if self.returncode is None:
            self.returncode = code
            os.close(self._pidfd)
            self._over.set()


class ForkServer:
    """Keeps `engine.processes.forkserver` running. While it is down, commands are started as fresh processes.

    Owns: the fork server, the exit codes of the engines that it forked.
    Does not own: what engines say (`process`), when they should live (`supervisor`).
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._connection: socket.socket | None = None
        self._server: Running | None = None
        self._ready = asyncio.Event()
        self._forked: asyncio.Queue[_Forked] = asyncio.Queue()
        self._turn = asyncio.Lock()  # answers come in the order of requests
        self._engines: dict[int, _Forked] = {}
        self._gone = asyncio.Event()

    async def launch(self, command: Sequence[str], descriptors: Mapping[str, int]) -> Running:
        """Fork the engine that `command` would start; see `Launch`.

        `descriptors` are `--fd` and, for rank 0, `--text-fd`, in this order.
        """
        async with self._turn:
            try:
                async with asyncio.timeout(_READY_WITHIN_S):
                    await self._ready.wait()
                    if self._connection is not None:
                        socket.send_fds(self._connection, [b"fork"], list(descriptors.values()))
                        return await self._answer()
            except TimeoutError:
                log.warning("the fork server does not answer")
                if self._server is not None:
                    self._server.kill()  # a late answer would be taken for the answer to another request
            except OSError as error:
                log.warning("not forked", extra={"reason": str(error)})
        return await spawn(command, descriptors)

    async def _answer(self) -> _Forked:
        """The next engine. Raises OSError when the server has gone instead."""
        forked, gone = asyncio.ensure_future(self._forked.get()), asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait([forked, gone], return_when=asyncio.FIRST_COMPLETED)
            if not forked.done():
                raise OSError("the fork server has gone")
            return forked.result()
        finally:
            forked.cancel()
            gone.cancel()

    async def run(self) -> None:
        """Start the server, and start it again whenever it ends, until cancelled."""
        while True:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            self._server = server = await spawn(self._command, {"--fd": theirs.fileno()})
            theirs.close()
            loop = asyncio.get_running_loop()
            self._gone.clear()
            loop.add_reader(ours, self._hear, ours)
            self._connection = ours
            try:
                code = await server.wait()
                log.warning("the fork server has ended", extra={"code": code})
            finally:
                server.kill()
                await server.wait()
                loop.remove_reader(ours)
                self._hear(ours)
                ours.close()
                self._lost()
            await asyncio.sleep(_PAUSE_S)

    def _hear(self, connection: socket.socket) -> None:
        """Read every message of the server."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                said, descriptors, _, _ = socket.recv_fds(connection, _ANSWER, 1)
                match said.split():
                    case [b"ready"]:
                        self._ready.set()
                    case [b"forked", pid]:
                        engine = self._engines[int(pid)] = _Forked(int(pid), *descriptors)
                        self._forked.put_nowait(engine)
                    case [b"ended", pid, code]:
                        self._engines.pop(int(pid)).ended(int(code))
                    case _:
                        return

    def _lost(self) -> None:
        """Take the server's engines for dead: the kernel kills them when their parent ends."""
        self._connection = None
        self._ready.clear()
        self._gone.set()
        for engine in self._engines.values():
            engine.kill()
            engine.ended(-signal.SIGKILL)
        self._engines.clear()
