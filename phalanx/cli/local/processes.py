"""Finding and ending the processes of a local cluster, and never a stranger.

Every process of a cluster inherits an environment variable that names its state directory. A process
is signalled through a pidfd that was opened before the variable was read, so that a pid that the
kernel has given to somebody else in between cannot be hit.
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

_POLL_S = 0.2  # how long a round of a sweep waits before it looks for new processes


@dataclass(frozen=True, slots=True)
class Member:
    """A process of a cluster. `fd` is its pidfd."""

    pid: int
    fd: int

    def send(self, signum: signal.Signals) -> None:
        """Signal it; nothing happens when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, signum)

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within the time."""
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
    """Every process of the cluster in `state_dir`, this one aside."""
    numbers = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in numbers if pid != os.getpid() and _is_marked(pid, state_dir)]


def end_all(state_dir: Path, grace_s: float) -> int:
    """SIGTERM, then SIGKILL after `grace_s`, until no process of the cluster is left.

    Returns how many had to be ended. Processes started meanwhile are ended too.
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
