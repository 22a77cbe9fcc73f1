"""Where requests wait until their grammar has been compiled, so that no step waits for it.

Owns: the requests that wait. Does not own: grammars, the requests that run.
"""

from __future__ import annotations

import select
from collections.abc import Iterable, Iterator

from engine.distributed.channel import HasFileno
from engine.grammar.grammars import Grammars
from engine.ipc.wire import CancelRequest, Message, SubmitRequest


class Gate:
    """Lets messages pass in order, but for those of a request that waits."""

    def __init__(self, grammars: Grammars, link: HasFileno) -> None:
        self._grammars = grammars
        self._waiting: dict[str, list[SubmitRequest | CancelRequest]] = {}
        self._news = select.epoll()
        self._news.register(link.fileno(), select.EPOLLIN)
        self._news.register(grammars.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when a message has come, or a request may have stopped waiting."""
        return self._news.fileno()

    def passing(self, messages: Iterable[Message]) -> Iterator[Message]:
        """What can be acted on now: of what waited, then of what has come."""
        for id, held in list(self._waiting.items()):
            if self._is_ready(held[0]):
                del self._waiting[id]
                yield from held
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
