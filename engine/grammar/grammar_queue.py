"""Holds back requests until their grammars are compiled, so that no step waits for a compiler.

Owns: the messages of requests that wait. Does not own: grammars, and requests that are running.
"""

from __future__ import annotations

import select
from collections.abc import Iterable, Iterator

from engine.distributed.channel import HasFileno
from engine.grammar.service import GrammarService
from engine.ipc.wire import CancelRequest, Message, SubmitRequest


class GrammarQueue:
    """Passes messages on in order, except those of a request whose grammar is being compiled."""

    def __init__(self, grammars: GrammarService, link: HasFileno) -> None:
        self._grammars = grammars
        self._waiting: dict[str, list[SubmitRequest | CancelRequest]] = {}  # by request id, in order
        self._epoll = select.epoll()
        self._epoll.register(link.fileno(), select.EPOLLIN)
        self._epoll.register(grammars.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when a message has come, or when a grammar has been compiled or refused."""
        return self._epoll.fileno()

    def admit(self, messages: Iterable[Message]) -> Iterator[Message]:
        """The messages to handle now: first of requests that need not wait any more, then of the new ones."""
        for id, waiting in list(self._waiting.items()):
            if self._is_ready(waiting[0]):
                del self._waiting[id]
                yield from waiting
        for message in messages:
            match message:
                case CancelRequest(id, None) if id in self._waiting:
                    del self._waiting[id]
                case CancelRequest(id, _) if id in self._waiting:
                    self._waiting[id].append(message)
                case SubmitRequest(request) if not self._is_ready(message):
                    self._waiting.setdefault(request.id, []).append(message)
                case _:
                    yield message

    def _is_ready(self, message: SubmitRequest | CancelRequest) -> bool:
        if not isinstance(message, SubmitRequest):
            return True
        grammar = message.request.sampling.grammar
        return grammar is None or self._grammars.ready(grammar)
