"""Entry point of the text process: `python -m engine.text.process --fd N --engines-fd M`.

N is a socket to the worker. M is a SOCK_SEQPACKET socket over which the worker passes a socket to each new
engine, with the engine's number. The engine writes its steps there; the text process adds text and sends them
to the worker with the engine's number (`engine.ipc.wire.Step`).

Owns: the sockets. Does not own: the text of requests (`service`), which outlives engines.
"""

from __future__ import annotations

import argparse
import select
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace

from engine.errors import EngineError, ModelError
from engine.ipc.background import import_in_background
from engine.ipc.link import Link, LinkClosedError, die_with_parent
from engine.ipc.wire import EngineFailed, StartText, Step, TextReady
from engine.text.service import TextService
from engine.text.tokenizer import forgo_torch, tokenizer_of

_NUMBER_BYTES = 32
_SWITCH_S = 0.0005  # seconds after which a chat template in the encoder's thread must yield to a step


class EngineStreams:
    """The steps of the newest engine.

    The worker kills an engine before it passes the socket of the next one. Unread bytes of the killed engine,
    perhaps half a message, are dropped with its socket and its buffer.
    """

    def __init__(self, engines: socket.socket) -> None:
        self._engines = engines
        self._number, self._link = 0, None  # type: tuple[int, Link | None]

    def sockets(self) -> list[socket.socket | Link]:
        """The sockets to wait for."""
        return [self._engines] if self._link is None else [self._engines, self._link]

    def receive(self, readable: Sequence[object]) -> list[Step]:
        """Steps that have arrived.

        Raises:
            LinkClosedError: the worker is gone.
            ValueError: the engine has sent something that is no message.
        """
        if self._engines in readable:
            self._accept()
        elif self._link is not None and self._link in readable:
            try:
                messages = self._link.receive(0)
            except LinkClosedError:
                self.close()
                return []
            except ValueError:
                self.close()
                raise
            return [replace(step, engine=self._number) for step in messages if isinstance(step, Step)]
        return []

    def _accept(self) -> None:
        number, descriptors, _, _ = socket.recv_fds(self._engines, _NUMBER_BYTES, 1)
        if not number:
            raise LinkClosedError
        self.close()
        self._number, self._link = int(number), Link.inherited(*descriptors)

    def close(self) -> None:
        """Read no more steps of this engine."""
        if self._link is not None:
            self._link.close()
            self._link = None


def serve(link: Link, streams: EngineStreams, service: TextService) -> None:
    """Answer the worker and add text to steps. Raises LinkClosedError when the worker's socket closes."""
    while True:
        readable, _, _ = select.select([link, *streams.sockets()], [], [])
        if link in readable:
            for message in link.receive(0):
                service.handle(message)
        try:
            steps = streams.receive(readable)
        except ValueError as error:
            link.send(EngineFailed("INTERNAL", f"the engine broke the protocol: {error}", permanent=False))
            continue
        for step in steps:
            link.send(service.fill(step))


def main() -> None:
    """Serve until the worker's socket closes."""
    parser = argparse.ArgumentParser(description="The text process beside an engine.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the worker")
    parser.add_argument("--engines-fd", type=int, required=True, help="inherited socket for engines' sockets")
    options = parser.parse_args()
    link, engines = Link.inherited(options.fd), socket.socket(fileno=options.engines_fd)
    die_with_parent()
    link.beat()
    forgo_torch()
    sys.setswitchinterval(_SWITCH_S)
    try:
        _run(link, engines)
    except LinkClosedError:
        return
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        reason = error.reason if isinstance(error, EngineError) else "INTERNAL"
        link.send(EngineFailed(reason, str(error), permanent=isinstance(error, ModelError)))
        raise SystemExit(1) from error


def _run(link: Link, engines: socket.socket) -> None:
    start, *early = link.receive()
    if not isinstance(start, StartText):
        raise EngineError("INTERNAL", f"expected StartText, got {type(start).__name__}")
    import_in_background("transformers")
    tokenizer = tokenizer_of(start)
    service = TextService(tokenizer, link.send)
    link.send(TextReady(tokenizer.longest_token_bytes()))
    for message in early:
        service.handle(message)
    serve(link, EngineStreams(engines), service)


if __name__ == "__main__":
    main()
