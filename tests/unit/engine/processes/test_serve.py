"""Rank 0's loop, with a core that computes nothing: what the worker gets, and what the text process gets."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.errors import RequestError
from engine.ipc.link import Link
from engine.ipc.wire import Alive, Began, CancelRequest, Message, Probe, Step, StepEnded, SubmitRequest
from engine.processes.serve import serve
from engine.request import Delta, Load, Refusal, Request


class IdleError(Exception):
    """Ends the loop when the core has nothing to do."""


@dataclass
class FakeCore:
    """A step computes a token of every live request, and ends the oldest one."""

    grammars: object = None
    live: list[Request] = field(default_factory=list)
    canaries: int = 0
    step: int = 0

    @property
    def busy(self) -> bool:
        return bool(self.live)

    @property
    def load(self) -> Load:
        return Load(running=len(self.live))

    def submit(self, request: Request, now: float) -> tuple[Delta, ...]:
        if not request.prompt_ids:
            raise RequestError("EMPTY_PROMPT", "no tokens")
        self.live.append(request)
        return ()

    def cancel(self, request_id: str, choice: int | None) -> None:
        self.live = [request for request in self.live if request.id != request_id]

    def launch(self, now: float, on_launch: Callable[[int], None]) -> int:
        on_launch(len(self.live))
        return 1

    def collect(self, now: float) -> tuple[int, tuple[Delta, ...]]:
        self.step += 1
        return self.step, (Delta(self.live.pop(0).id, 0, 0, (7,), finish="length"),)

    def canary(self, now: float) -> None:
        assert not self.busy
        self.canaries += 1

    def wait(self, beside: object) -> None:
        raise IdleError


class TextProcess:
    """Takes steps."""

    def __init__(self) -> None:
        self.steps: list[Message] = []

    def send(self, message: Message) -> None:
        self.steps.append(message)


@pytest.fixture
def sockets() -> Iterator[tuple[Link, Link]]:
    engine, worker = map(Link, socket.socketpair())
    yield engine, worker
    engine.close()
    worker.close()


def run(core: FakeCore, sockets: tuple[Link, Link], *messages: Message) -> tuple[list[Any], list[Message]]:
    """Serve these messages until the core is idle: what the text process and the worker get."""
    engine, worker = sockets
    text = TextProcess()
    core.grammars = worker  # only its descriptor is used: no request has a grammar
    with pytest.raises(IdleError):
        serve(core, engine, text, list(messages))  # type: ignore[arg-type]
    return text.steps, list(worker.receive(0))


def test_steps_go_to_the_text_process_and_the_worker_sees_that_they_begin_and_end(
    sockets: tuple[Link, Link],
) -> None:
    asked = [SubmitRequest(Request(name, (1,))) for name in ("a", "b")]
    steps, to_worker = run(FakeCore(), sockets, *asked)
    a, b = (Delta(name, 0, 0, (7,), finish="length") for name in ("a", "b"))
    assert steps == [
        Step(0, Load(running=2), accepted=("a", "b")),
        Step(1, Load(running=1), deltas=(a,)),
        Step(2, Load(), deltas=(b,)),
    ]
    assert to_worker == [Began(2), StepEnded(), Began(1), StepEnded()]


def test_a_refused_request_is_reported_and_runs_no_step(sockets: tuple[Link, Link]) -> None:
    steps, to_worker = run(FakeCore(), sockets, SubmitRequest(Request("a", ())))
    assert steps == [Step(0, Load(), failed=(Refusal("a", "EMPTY_PROMPT", "no tokens"),))]
    assert to_worker == []


def test_a_cancellation_changes_the_load_that_is_reported(sockets: tuple[Link, Link]) -> None:
    core = FakeCore(live=[Request("a", (1,))])
    steps, to_worker = run(core, sockets, CancelRequest("a"))
    assert steps == [Step(0, Load())]
    assert to_worker == []


def test_commands_that_change_nothing_are_not_reported(sockets: tuple[Link, Link]) -> None:
    assert run(FakeCore(), sockets, CancelRequest("unknown")) == ([], [])


def test_a_probe_runs_a_canary_only_while_there_is_no_work(sockets: tuple[Link, Link]) -> None:
    idle, busy = FakeCore(), FakeCore()
    assert run(idle, sockets, Probe()) == ([], [Alive()])
    _, to_worker = run(busy, sockets, SubmitRequest(Request("a", (1,))), Probe())
    assert to_worker == [Alive(), Began(1), StepEnded()]
    assert (idle.canaries, busy.canaries) == (1, 0)
