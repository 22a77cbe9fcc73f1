"""The sending end of a socket whose reader may stand still."""

from __future__ import annotations

import select
import socket
import threading

from engine.ipc.wire import Message, encode


class BufferedSender:
    """Sends messages in order and never waits for the reader.

    An engine sends its steps so: a text process that hangs must not make the engine look hung.

    Owns: the bytes that the socket has not taken yet; their number has no bound, so the reader's death or
    hang must be noticed elsewhere. Does not own: what follows when the reader is gone; messages to it are
    lost.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._backlog = bytearray()
        self._changed = threading.Condition()
        self._flusher: threading.Thread | None = None  # started by the first backlog

    def send(self, message: Message) -> None:
        """Send one message now, or after what waits already."""
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
        """How many bytes the socket has taken, or would have taken if its reader were there."""
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
