from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from engine.grammar.grammar_queue import GrammarQueue
from engine.ipc.wire import CancelRequest, Message, SubmitRequest
from engine.request import Grammar, Request, SamplingParams

SLOW, FAST = Grammar("regex", "slow"), Grammar("regex", "fast")


class FakeService:
    """A service whose grammars are ready when a test says so."""

    def __init__(self) -> None:
        self.done = {FAST}
        self._there, self._here = socket.socketpair()

    def fileno(self) -> int:
        return self._there.fileno()

    def ready(self, grammar: Grammar) -> bool:
        return grammar in self.done

    def finish(self) -> None:
        self.done.add(SLOW)
        self._here.send(b"x")

    def close(self) -> None:
        self._there.close()
        self._here.close()


@pytest.fixture
def grammars() -> Iterator[FakeService]:
    grammars = FakeService()
    yield grammars
    grammars.close()


@pytest.fixture
def link() -> Iterator[socket.socket]:
    here, there = socket.socketpair()
    with here, there:
        yield here


@pytest.fixture
def queue(grammars: FakeService, link: socket.socket) -> GrammarQueue:
    return GrammarQueue(grammars, link)  # type: ignore[arg-type]


def submit(id: str, grammar: Grammar | None = None) -> SubmitRequest:
    return SubmitRequest(Request(id, (1,), SamplingParams(grammar=grammar)))


def test_only_who_needs_a_grammar_that_is_not_ready_waits(queue: GrammarQueue, grammars: FakeService) -> None:
    slow, fast, free = submit("slow", SLOW), submit("fast", FAST), submit("free")
    cancel = CancelRequest("other")
    assert list(queue.admit([slow, fast, cancel, free])) == [fast, cancel, free]
    assert list(queue.admit([])) == []
    grammars.finish()
    assert list(queue.admit([free])) == [slow, free]
    assert list(queue.admit([])) == []


def test_a_request_cancelled_while_it_waits_never_passes(queue: GrammarQueue, grammars: FakeService) -> None:
    waiting: list[Message] = [submit("a", SLOW), CancelRequest("a")]
    assert list(queue.admit(waiting)) == []
    grammars.finish()
    assert list(queue.admit([])) == []


def test_a_choice_cancelled_while_its_request_waits_is_cancelled_after_it(
    queue: GrammarQueue, grammars: FakeService
) -> None:
    slow, cancel = submit("a", SLOW), CancelRequest("a", 1)
    assert list(queue.admit([slow, cancel])) == []
    grammars.finish()
    assert list(queue.admit([])) == [slow, cancel]


def test_it_wakes_for_messages_and_for_grammars(
    queue: GrammarQueue, grammars: FakeService, link: socket.socket
) -> None:
    assert not select.select([queue], [], [], 0)[0]
    grammars.finish()
    assert select.select([queue], [], [], 5)[0]
