"""The messages between the driver of a measurement and its contestants: JSON lines over pipes.

Standard library only: a contestant may run under another interpreter that has none of our packages.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Setup:
    """How to build a contestant. Lengths are in tokens.

    random_weights: the model directory has only a config.json.
    static: transformers with a static KV cache, which compiles the model on a GPU.
    device: for transformers only.
    """

    model: str
    dtype: str = "bfloat16"
    quantization: str = ""
    threads: int = 1
    max_model_len: int = 4608
    kv_bytes: int = 1 << 30
    max_running: int = 256
    max_batch_tokens: int = 0  # per step; 0 is the contestant's default
    eager: bool = False
    static: bool = False
    device: str = "cpu"
    random_weights: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts to complete greedily: `new_tokens[i]` tokens for prompt i; end-of-sequence is ignored.

    The last `late` prompts arrive when each of the others has `late_after` tokens.
    """

    prompts: Sequence[Sequence[int]]
    new_tokens: Sequence[int]
    late: int = 0
    late_after: int = 0


@dataclass(slots=True)
class Trace:
    """What happened. Times are seconds since the first prompt was submitted.

    `events` has one entry for every moment at which tokens arrived: the time, and the indices of the prompts
    that got a token then.
    """

    token_ids: list[list[int]]
    submitted: list[float]
    events: list[tuple[float, list[int]]] = field(default_factory=list)
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """A contestant is ready: its name and versions, and its peak memory so far."""

    name: str
    peak_bytes: int
    details: str = ""


class Contestant(Protocol):
    """Something that completes prompts."""

    name: str
    details: str

    def run(self, work: Work) -> Trace:
        """Do the work and return when each token arrived."""
        ...


class Recorder:
    """Builds a trace. Its clock starts when it is created."""

    def __init__(self, work: Work) -> None:
        self._start = time.perf_counter()
        count = len(work.prompts)
        self._trace = Trace([[] for _ in range(count)], [0.0] * count)
        self._work = work
        self._early = count - work.late
        self._late_pending = work.late > 0

    def late_arrivals(self) -> range:
        """The late prompts, once they are due; an empty range before and after."""
        early = self._trace.token_ids[: self._early]
        if not self._late_pending or min(map(len, early)) < self._work.late_after:
            return range(0)
        self._late_pending = False
        due = range(self._early, len(self._work.prompts))
        now = time.perf_counter() - self._start
        for index in due:
            self._trace.submitted[index] = now
        return due

    @property
    def early(self) -> range:
        """The prompts that are there from the start."""
        return range(self._early)

    def tokens(self, tokens: Sequence[tuple[int, int]], at: float | None = None) -> None:
        """Record pairs (prompt, token id) that arrived now, or at the time `at` of `time.perf_counter`."""
        if tokens:
            elapsed = (time.perf_counter() if at is None else at) - self._start
            self._trace.events.append((elapsed, [index for index, _ in tokens]))
        for index, token in tokens:
            self._trace.token_ids[index].append(token)

    def finish(self) -> Trace:
        """The whole trace.

        Raises:
            RuntimeError: a prompt was not completed to its length.
        """
        for index, (ids, count) in enumerate(zip(self._trace.token_ids, self._work.new_tokens, strict=True)):
            if len(ids) != count:
                raise RuntimeError(f"prompt {index} got {len(ids)} tokens of {count}")
        self._trace.peak_bytes = peak_bytes()
        return self._trace


def peak_bytes() -> int:
    """The peak memory of this process (VmHWM), plus those of its live descendants."""
    return sum(map(_high_water, [os.getpid(), *_descendants(os.getpid())]))


def serve(build: Callable[[Setup], Contestant]) -> None:
    """Be a contestant: read a Setup, then one Work after another, from standard input; answer each.

    Answers go to standard output. The output of libraries is redirected to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    contestant = build(Setup(**json.loads(sys.stdin.readline())))
    ready = Ready(contestant.name, peak_bytes(), contestant.details)
    answers.write(json.dumps(asdict(ready)) + "\n")
    for line in sys.stdin:
        trace = contestant.run(Work(**json.loads(line)))
        answers.write(json.dumps(asdict(trace)) + "\n")


def _descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
            parents[int(entry.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found.extend(child for child, its in parents.items() if its == parent)
    return found[1:]


def _high_water(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0  # it has ended meanwhile
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
