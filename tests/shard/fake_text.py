"""A text process for tests: a text is its code points, a token t is the piece "<t>".

The text "refuse" is refused and "wait" is never answered.
"""

from __future__ import annotations

import dataclasses
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.ipc import wire
from engine.ipc.link import Link
from engine.request import Delta, Refusal


class FakeText:
    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._link = sock, Link(sock)
        self._link.beat()
        self._stops: dict[str, tuple[str, ...]] = {}
        self._ended: set[tuple[str, int]] = set()

    def encode(self, message: wire.Encode) -> wire.Message | None:
        text = message.text if message.text is not None else "".join(said for _, said in message.messages)
        if text == "wait":
            return None
        if text == "refuse":
            return wire.NotEncoded(Refusal(message.id, "NO_CHAT_TEMPLATE", "none"))
        return wire.Encoded(message.id, tuple(map(ord, text)))

    def delta(self, delta: Delta) -> Delta:
        if (delta.id, delta.choice) in self._ended:
            return dataclasses.replace(delta, token_ids=())
        if delta.id not in self._stops:
            return delta
        pieces = tuple(f"<{token}>" for token in delta.token_ids)
        if any(piece in self._stops[delta.id] for piece in pieces):
            self._ended.add((delta.id, delta.choice))
            return dataclasses.replace(delta, pieces=("",), finish="stop")
        return dataclasses.replace(delta, pieces=pieces)

    def answer(self, message: wire.Message) -> wire.Message | None:
        match message:
            case wire.StartText():
                return wire.TextReady()
            case wire.Encode():
                return self.encode(message)
            case wire.Track():
                self._stops[message.id] = message.stop
            case wire.Forget():
                self._stops.pop(message.id, None)
            case wire.Step():
                return dataclasses.replace(message, deltas=tuple(map(self.delta, message.deltas)))
        return None

    def run(self) -> None:
        frames = wire.FrameBuffer()
        while data := self._sock.recv(1 << 16):
            for message in frames.feed(data):
                answer = self.answer(message)
                if answer is not None:
                    self._link.send(answer)


if __name__ == "__main__":
    FakeText(socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))).run()
