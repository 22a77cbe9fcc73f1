"""A child process of a worker: it is started, spoken to over a socket pair, ended by SIGKILL, and reaped.

Owns: one process and the worker's end of the pair.
Does not own: how the process is started (`launch`), what messages mean, when it should live (`supervisor`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dataplane.shard.launch import Launch, Running, spawn
from engine.ipc import wire

_CHUNK = 1 << 16

log = logging.getLogger(__name__)


class Child:
    """One child process from before its start to after its end."""

    def __init__(
        self,
        command: Sequence[str],
        start: wire.Message,
        *,
        on_spawned: Callable[[int], None],
        on_message: Callable[[wire.Message], None],
        launch: Launch = spawn,
        sockets: Mapping[str, socket.socket] | None = None,
    ) -> None:
        """Prepare a process without starting it.

        Args:
            command: what to run; `--fd N` is appended, N the process's end of the pair.
            start: the first message to the process.
            on_spawned: is called with the process id.
            on_message: is called with every message of the process, in order.
            launch: starts the process.
            sockets: further sockets that the process inherits, by the option that names each. They are closed
                here once it has started.
        """
        self._command, self._launch = command, launch
        self._on_spawned, self._on_message = on_spawned, on_message
        self._pending: list[wire.Message] | None = [start]
        self._transport: asyncio.Transport | None = None
        self._process: Running | None = None
        self._sockets = dict(sockets or {})
        self._killed = False
        self._broken = ""

    def send(self, message: wire.Message) -> None:
        """Send after every earlier message. Messages to a dead child are lost."""
        if self._pending is not None:
            self._pending.append(message)
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.encode(message))

    def kill(self) -> None:
        """End the process now, or as soon as it has started. Idempotent."""
        self._killed = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def run(self) -> str:
        """Start the process, pass its messages on, wait for its end, and return how it ended.

        Every message that the process wrote has been passed on when this returns.
        """
        ours, theirs = socket.socketpair()
        with ours:
            inherited = {"--fd": theirs, **self._sockets}
            try:
                if self._killed:
                    return "was never started"
                descriptors = {option: each.fileno() for option, each in inherited.items()}
                self._process = await self._launch(self._command, descriptors)
            except OSError as error:
                return f"could not be started: {error}"
            finally:
                for each in inherited.values():
                    each.close()
            try:
                await self._attend(ours)
            finally:
                self.kill()
                returncode = await self._process.wait()
        return self._broken or describe(returncode)

    async def _attend(self, ours: socket.socket) -> None:
        """Send and receive until the process has ended."""
        assert self._process is not None
        protocol = _Link(self._receive, self.kill)
        ours.setblocking(False)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: protocol, sock=ours)
        self._transport, pending, self._pending = transport, self._pending, None
        try:
            if self._killed:
                self.kill()
            else:
                self._on_spawned(self._process.pid)
            for message in pending or ():
                self.send(message)
            await self._process.wait()
            # The last messages may still lie in the socket. Descendants of the process may hold the other end
            # open, so the end of the process ends the reading, not the end of the stream.
            if not transport.is_closing():
                transport.pause_reading()
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    while data := ours.recv(_CHUNK):
                        self._receive(data, protocol.frames)
        finally:
            transport.abort()

    def _receive(self, data: bytes, frames: wire.FrameBuffer) -> None:
        if self._broken:
            return
        try:
            messages = list(frames.feed(data))
        except ValueError as error:
            self._broken = f"broke the protocol: {error}"
            self.kill()
            return
        try:
            for message in messages:
                self._on_message(message)
        except Exception as error:
            # This child and its epoch end, as after any fault of a child; the worker serves the next epoch.
            log.exception("a child's message could not be handled", extra={"command": self._command[-1]})
            self._broken = f"sent what could not be handled: {error!r}"
            self.kill()


class TextChild(Child):
    """A text process. It also reads the steps of an engine, over a socket that the two have to themselves."""

    def __init__(self, command: Sequence[str], start: wire.Message, **options: Any) -> None:
        """Prepare a text process; see `Child`."""
        self._engines, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._engines.setblocking(False)
        super().__init__(command, start, **options, sockets={"--engines-fd": theirs})

    def connect(self, engine: int) -> socket.socket:
        """A socket for the engine of this number. From now on the text process reads steps from it alone.

        Works before the process has started: it finds the other end when it looks.
        """
        for_engine, for_text = socket.socketpair()
        # The supervisor ends the epoch of a text process that is gone or hangs: no need to fail here.
        with for_text, contextlib.suppress(OSError):
            socket.send_fds(self._engines, [b"%d" % engine], [for_text.fileno()])
        return for_engine

    async def run(self) -> str:
        """See `Child`."""
        with self._engines:
            return await super().run()


class _Link(asyncio.Protocol):
    """The worker's end of the pair."""

    def __init__(
        self, receive: Callable[[bytes, wire.FrameBuffer], None], closed: Callable[[], None]
    ) -> None:
        self.frames = wire.FrameBuffer()
        self._receive, self._closed = receive, closed

    def data_received(self, data: bytes) -> None:
        self._receive(data, self.frames)

    def connection_lost(self, exc: Exception | None) -> None:
        # A process that has closed its end can do nothing for the worker any more, even if it still runs.
        self._closed()


def describe(returncode: int) -> str:
    """How a process ended, as the rest of a sentence."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"was killed by signal {-returncode}"
