"""An engine or text process as a real child process, at the other end of a real socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from engine.config import EngineConfig
from engine.ipc.link import Link
from engine.ipc.wire import EngineReady, Message, StartEngine, Step, SubmitRequest
from engine.request import Delta, Request

DEADLINE_S = 60.0
MAX_WAIT_S = 240.0  # Triton may compile kernels for the first time
M = TypeVar("M", bound=Message)


class Child:
    """Sends messages, and receives them one by one."""

    def __init__(self, process: subprocess.Popen[bytes], link: Link) -> None:
        self.process = process
        self.link = link
        self._arrived: list[Message] = []

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.link.send(message)

    def next(self) -> Message:
        """The next message. Raises TimeoutError, or LinkClosedError when the child has gone."""
        end = time.monotonic() + DEADLINE_S
        while not self._arrived:
            if time.monotonic() > end:
                raise TimeoutError("no message from the child")
            self._arrived.extend(self.link.receive(0.1))
        return self._arrived.pop(0)

    def expect(self, kind: type[M], where: Callable[[M], object] = lambda message: True) -> M:
        """The next message of a kind; drops the messages before it. Raises TimeoutError."""
        # `next` gives up earlier if the child is silent: a child that runs sends a Beat every half second.
        end = time.monotonic() + MAX_WAIT_S
        while time.monotonic() < end:
            message = self.next()
            if isinstance(message, kind) and where(message):
                return message
        raise TimeoutError(f"no {kind.__name__} from the child")

    def run(self, request: Request) -> list[Delta]:
        """Submit a request and take its deltas until every choice has finished."""
        self.send(SubmitRequest(request))
        deltas: list[Delta] = []
        while sum(delta.finish is not None for delta in deltas) < request.n:
            step = self.expect(Step)
            assert not step.failed, step.failed
            deltas += [delta for delta in step.deltas if delta.id == request.id]
        return deltas


@contextmanager
def child(module: str) -> Iterator[Child]:
    """A process of `python -m module --fd N`, killed at the end."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    link = Link(ours)
    try:
        yield Child(process, link)
    finally:
        link.close()
        process.kill()
        process.wait()


@contextmanager
def engine(model: Path, epoch: int = 5) -> Iterator[Child]:
    """A ready engine of one rank."""
    with child("engine.processes.rank") as process:
        process.send(StartEngine(EngineConfig(str(model), epoch=epoch)))
        process.expect(EngineReady)
        yield process
