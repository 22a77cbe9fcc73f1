"""Blocking messages (`engine.ipc.wire`) over a socket, and a way for a child to die with its parent."""

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
        """The link over a descriptor that this process has inherited from its parent."""
        return Link(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """The descriptor, for `select`."""
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
            pass  # the thread that reads the link notices the same

    def receive(self, timeout_s: float | None = None) -> tuple[Message, ...]:
        """The messages that have arrived. Waits for the first of them.

        Args:
            timeout_s: seconds to wait; None waits without limit. After a timeout there may be none.

        Raises:
            LinkClosedError: the other side is gone.
            ValueError: the other side has sent something that is no message.
        """
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
        """Close the socket. The other side reads the end of the stream."""
        self._socket.close()


def die_with_parent() -> None:
    """Make the kernel kill this process when the thread that started it ends."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # the parent ended before the call above
        os._exit(1)
