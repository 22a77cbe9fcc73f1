"""A child's end of the socket that carries `engine.ipc.wire` messages, and its tie to its parent's life."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import threading
import time

from engine.ipc.wire import BEAT_S, Beat, FrameBuffer, Message, encode

_PR_SET_PDEATHSIG = 1
_RECEIVE = 1 << 20


class LinkClosedError(Exception):
    """The other side is gone."""


class Link:
    """Blocking, ordered messages over a connected stream socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        self._socket = connection
        self._buffer = FrameBuffer()
        self._sending = threading.Lock()

    @staticmethod
    def inherited(fd: int) -> Link:
        """The link over a descriptor that the parent passed on."""
        return Link(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send one message. Raises LinkClosedError."""
        try:
            with self._sending:
                self._socket.sendall(encode(message))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise LinkClosedError from error

    def beat(self) -> None:
        """Send a `Beat` every BEAT_S from now on, from a thread."""
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def _beat(self) -> None:
        try:
            while True:
                self.send(Beat())
                time.sleep(BEAT_S)
        except (LinkClosedError, OSError):
            pass  # the reader of the link meets the same end

    def receive(self, timeout_s: float | None = None) -> tuple[Message, ...]:
        """Messages that have arrived; waits for some, at most `timeout_s`. Raises LinkClosedError."""
        messages: tuple[Message, ...] = ()
        while not messages and select.select([self._socket], [], [], timeout_s)[0]:
            try:
                data = self._socket.recv(_RECEIVE)
            except ConnectionResetError as error:
                raise LinkClosedError from error
            if not data:
                raise LinkClosedError
            messages = tuple(self._buffer.feed(data))
            if timeout_s is not None:
                break
        return messages

    def close(self) -> None:
        """Close the socket; the other side meets the end of the stream."""
        self._socket.close()


def die_with_parent() -> None:
    """Make the kernel kill this process when the thread that started it ends."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # the parent ended before the call above
        os._exit(1)
