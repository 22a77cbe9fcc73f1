"""Finds and ends the processes of a local cluster, and never another process.

Every process of a cluster inherits an environment variable with the cluster's state directory. A signal
goes through a pidfd that is opened before the variable is read. So a pid that the kernel has reused in
between is never signalled.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phalanx.cli.local.spec import MARK

_POLL_S = 0.2  # how long `end_all` waits for a process before it looks for new ones


@dataclass(frozen=True, slots=True)
class Member:
    """A process of a cluster. `fd` is its pidfd."""

    pid: int
    fd: int

    def send(self, signum: signal.Signals) -> None:
        """Send a signal. Does nothing when the process is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, signum)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the process to end; whether it did within `timeout_s` seconds."""
        return bool(select.select([self.fd], [], [], max(0.0, timeout_s))[0])


@contextlib.contextmanager
def member(state_dir: Path, pid: int) -> Iterator[Member | None]:
    """The process with this pid if it belongs to the cluster in `state_dir`, else None."""
    try:
        fd = os.pidfd_open(pid)
    except (ProcessLookupError, ValueError):
        yield None
        return
    try:
        yield Member(pid, fd) if _is_marked(pid, state_dir) else None
    finally:
        os.close(fd)


def pids(state_dir: Path) -> list[int]:
    """Every process of the cluster in `state_dir`, without this one."""
    numbers = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in numbers if pid != os.getpid() and _is_marked(pid, state_dir)]


def end_all(state_dir: Path, grace_s: float) -> int:
    """Send SIGTERM, and SIGKILL after `grace_s` seconds, until no process of the cluster is left.

    Processes that start meanwhile are ended too. Returns how many processes were signalled.
    """
    started, ended = time.monotonic(), set[int]()
    while left := pids(state_dir):
        graceful = time.monotonic() - started < grace_s
        for pid in left:
            with member(state_dir, pid) as process:
                if process is not None and (pid not in ended or not graceful):
                    process.send(signal.SIGTERM if graceful else signal.SIGKILL)
                    ended.add(pid)
        with member(state_dir, left[0]) as process:
            if process is not None:
                process.wait(_POLL_S)
    return len(ended)


def _is_marked(pid: int, state_dir: Path) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, or another user's
        return False
    return f"{MARK}={state_dir}".encode() in environment.split(b"\0")
