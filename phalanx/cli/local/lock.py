"""The lock on a running cluster's state directory. The kernel releases it when its holder ends in any way."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

FILE = "lock"


def take(state_dir: Path) -> int | None:
    """Take the lock; returns its descriptor, or None when a supervisor holds it.

    A child that inherits the descriptor holds the lock too.
    """
    fd = os.open(state_dir / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def sign(fd: int) -> None:
    """Write this process's pid into the lock file; the process must hold the lock."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)


def holder(state_dir: Path) -> int | None:
    """The pid in the lock file; None without one. That process may be gone."""
    try:
        text = (state_dir / FILE).read_text()
    except FileNotFoundError:
        return None
    return int(text) if text else None
