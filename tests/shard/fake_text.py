"""A text process for tests: a text is its code points, a token t is the piece "<t>".

The text "refuse" is refused and "wait" is never answered.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import socket
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.ipc import wire
from engine.ipc.link import Link, LinkClosedError
from engine.request import Delta, Refusal
from engine.text.process import EngineStreams, serve


class FakeText:
    """Stands in for `engine.text.service.TextService`."""

    def __init__(self, say: Callable[[wire.Message], None]) -> None:
        self._say = say
        self._stops: dict[str, tuple[str, ...]] = {}
        self._ended: set[tuple[str, int]] = set()

    def handle(self, message: wire.Message) -> None:
        match message:
            case wire.Encode():
                self._stops[message.id] = message.stop
                if (answer := self._encode(message)) is not None:
                    self._say(answer)
            case wire.Forget():
                self._stops.pop(message.id, None)

    def fill(self, step: wire.Step) -> wire.Step:
        return dataclasses.replace(step, deltas=tuple(map(self._fill, step.deltas)))

    def _encode(self, message: wire.Encode) -> wire.Message | None:
        text = message.text if message.text is not None else "".join(said for _, said in message.messages)
        if text == "wait":
            return None
        if text == "refuse":
            return wire.NotEncoded(Refusal(message.id, "NO_CHAT_TEMPLATE", "none"))
        return wire.Encoded(message.id, tuple(map(ord, text)))

    def _fill(self, delta: Delta) -> Delta:
        if (delta.id, delta.choice) in self._ended:
            return dataclasses.replace(delta, token_ids=(), finish=None, timing=None)
        if delta.id not in self._stops:
            return delta
        pieces = tuple(f"<{token}>" for token in delta.token_ids)
        if any(piece in self._stops[delta.id] for piece in pieces):
            self._ended.add((delta.id, delta.choice))
            return dataclasses.replace(delta, pieces=("",), finish="stop")
        return dataclasses.replace(delta, pieces=pieces)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    parser.add_argument("--engines-fd", type=int)
    options = parser.parse_args()
    link = Link.inherited(options.fd)
    link.beat()
    assert isinstance(*link.receive(), wire.StartText)
    link.send(wire.TextReady())
    streams = EngineStreams(socket.socket(fileno=options.engines_fd))
    with contextlib.suppress(LinkClosedError):
        serve(link, streams, FakeText(link.send))  # type: ignore[arg-type]  # the two calls that it needs


if __name__ == "__main__":
    main()
