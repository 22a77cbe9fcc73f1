"""A child process of a worker: started clean, spoken to over a socket pair, ended by SIGKILL, reaped.

Owns: one process and its end of the pair.
Does not own: how it is made (`launch`), what the messages mean, when it should live (`supervisor`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Sequence

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
    ) -> None:
        """Prepare `command`, which gets `--fd N` appended, and the first message for it.

        `launch` makes the process. `on_spawned` hears the process id, `on_message` every message in order.
        """
        self._command, self._launch = command, launch
        self._on_spawned, self._on_message = on_spawned, on_message
        self._pending: list[wire.Message] | None = [start]
        self._transport: asyncio.Transport | None = None
        self._process: Running | None = None
        self._killed = False
        self._broken = ""

    def send(self, message: wire.Message) -> None:
        """Send after everything sent before. What is sent to a dead child is lost."""
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
        """Start the process, pass its messages on, and wait for its end: how it ended.

        Every message that the process wrote has been passed on when this returns.
        """
        if self._killed:
            return "was never started"
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                try:
                    self._process = await self._launch(self._command, theirs.fileno())
                except OSError as error:
                    return f"could not be started: {error}"
            try:
                await self._attend(ours)
            finally:
                self.kill()
                returncode = await self._process.wait()
        return self._broken or describe(returncode)

    async def _attend(self, ours: socket.socket) -> None:
        """Carry messages both ways until the process has ended."""
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
            # Its last words may still lie in the socket. Descendants may hold the other end open, so
            # the end of the process counts, not the end of the stream.
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
            # The epoch goes, as after any fault of a child; the worker stays and forms the next.
            log.exception("a child's message could not be handled", extra={"command": self._command[-1]})
            self._broken = f"sent what could not be handled: {error!r}"
            self.kill()


class _Link(asyncio.Protocol):
    """Our end of the pair."""

    def __init__(
        self, receive: Callable[[bytes, wire.FrameBuffer], None], closed: Callable[[], None]
    ) -> None:
        self.frames = wire.FrameBuffer()
        self._receive, self._closed = receive, closed

    def data_received(self, data: bytes) -> None:
        self._receive(data, self.frames)

    def connection_lost(self, exc: Exception | None) -> None:
        # A process that closed its end can do nothing for us any more, even if it lingers.
        self._closed()


def describe(returncode: int) -> str:
    """How a process ended, as the rest of a sentence."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"was killed by signal {-returncode}"
