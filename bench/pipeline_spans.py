"""records when each rank of an engine computes, by wrapping the engine's methods

As a module it is one rank: `python -m bench.pipeline_spans SPANS --fd N` (see `engine.processes.rank`).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

from engine import Engine
from engine.distributed.parallel import Parallel
from engine.execution.runner import Runner
from engine.processes import rank as process


@dataclass(frozen=True, slots=True)
class Span:
    """One step on one rank, by the monotonic clock, which all processes of a machine share.

    The rank computes from `begin` to `end`, in nanoseconds; before, it waited for the stage before it.
    `reducing` of these passed in all-reduces, waiting for the other ranks included.
    """

    rank: int
    step: int
    tokens: int
    begin: int
    end: int
    reducing: int


def record(path: Path) -> None:
    """From now on, append every step that this process runs to a file."""
    file = path.open("a", buffering=1)
    run, receive, reduce = Runner.run, Parallel.recv_hidden, Parallel.all_reduce
    received = reducing = 0

    def timed(method: Callable[..., Any], note: Callable[[int, int], None]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            begin = time.monotonic_ns()
            try:
                return method(*arguments)
            finally:
                note(begin, time.monotonic_ns())

        return wrapped

    def note_receive(begin: int, end: int) -> None:
        nonlocal received
        received = end

    def note_reduce(begin: int, end: int) -> None:
        nonlocal reducing
        reducing += end - begin

    def traced(self: Runner, plan: Any) -> Any:
        nonlocal received, reducing
        received, reducing = time.monotonic_ns(), 0
        sampled = run(self, plan)
        rank = self._parallel.grid.rank
        print(rank, plan.step, plan.tokens, received, time.monotonic_ns(), reducing, file=file)
        return sampled

    Runner.run = traced  # type: ignore[method-assign]
    Parallel.recv_hidden = timed(receive, note_receive)  # type: ignore[method-assign]
    Parallel.all_reduce = timed(reduce, note_reduce)  # type: ignore[method-assign]


class RecordingEngine(Engine):
    """An engine whose child ranks record their steps. For rank 0, the caller calls `record` itself."""

    spans: Path

    def _start_process(self, theirs: socket) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "bench.pipeline_spans", str(self.spans), "--survive-thread"]
        return subprocess.Popen([*command, "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()])


def read(path: Path) -> list[Span]:
    """The recorded spans, in order of time."""
    spans = [Span(*map(int, line.split())) for line in path.read_text().splitlines()]
    return sorted(spans, key=lambda span: span.begin)


def busy_share(spans: Sequence[Span], rank: int) -> float:
    """The share of the time in which a rank computes, from the first span's begin to the last one's end."""
    begin, end = min(span.begin for span in spans), max(span.end for span in spans)
    return sum(span.end - span.begin for span in spans if span.rank == rank) / (end - begin)


def overlap_share(spans: Sequence[Span], one: int, other: int) -> float:
    """The time in which both ranks compute, divided by the time in which at least one does."""
    edges = sorted(
        (at, change) for span in spans if span.rank in (one, other)
        for at, change in ((span.begin, 1), (span.end, -1))
    )  # fmt: skip
    either = both = computing = last = 0
    for at, change in edges:
        either += (at - last) * (computing > 0)
        both += (at - last) * (computing > 1)
        computing, last = computing + change, at
    return both / either


if __name__ == "__main__":
    record(Path(sys.argv.pop(1)))
    process.main()
