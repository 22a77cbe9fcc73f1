"""Sends messages without waiting for their reader."""

from __future__ import annotations

import select
import socket
import threading

from engine.ipc.wire import Message, encode


class BufferedSender:
    """Sends messages in order; `send` never blocks.

    An engine sends its steps this way: a text process that hangs must not make the engine look hung.

    Owns: the bytes that the socket has not taken yet. Their number has no limit, so another part must notice
    a reader that hangs. Does not own: the reaction to a reader that is gone; messages to it are lost.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._backlog = bytearray()
        self._changed = threading.Condition()
        self._flusher: threading.Thread | None = None  # starts with the first backlog

    def send(self, message: Message) -> None:
        """Send one message after all earlier ones."""
        data = encode(message)
        with self._changed:
            sent = 0 if self._backlog else self._send_now(data)
            if sent < len(data):
                self._backlog += memoryview(data)[sent:]
                self._changed.notify()
                if self._flusher is None:
                    self._flusher = threading.Thread(target=self._flush, name="flush", daemon=True)
                    self._flusher.start()

    def _send_now(self, data: bytes | bytearray) -> int:
        """Write as much as the socket takes; return how many bytes need no further try.

        These are all bytes when the reader is gone.
        """
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except (BrokenPipeError, ConnectionResetError):
            return len(data)

    def _flush(self) -> None:
        while True:
            with self._changed:
                while not self._backlog:
                    self._changed.wait()
            select.select([], [self._socket], [])
            with self._changed:
                del self._backlog[: self._send_now(self._backlog)]
