"""Faults that no signal can cause: broken connections of a living process, and memory that runs out."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
from pathlib import Path

_PIDFD_GETFD = 438  # the number of the system call, on every architecture
_LIMIT_BYTES = 4096  # one page; memory that a process already has stays charged to its old cgroup
_CGROUPS = Path("/sys/fs/cgroup")


def cut_connections(pid: int) -> int:
    """Shut down every TCP connection of a process, as a firewall that loses its state; returns how many."""
    libc = ctypes.CDLL(None, use_errno=True)
    process, cut = os.pidfd_open(pid), 0
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if not os.readlink(entry).startswith("socket:"):
                    continue
                fd = libc.syscall(_PIDFD_GETFD, process, int(entry.name), 0)
                if fd < 0 and ctypes.get_errno() != errno.EBADF:
                    raise OSError(ctypes.get_errno(), "pidfd_getfd: may this user trace that process?")
                if fd >= 0:
                    cut += _shut(fd)
    finally:
        os.close(process)
    return cut


def _shut(fd: int) -> bool:
    """Shut down a socket if it is a TCP connection; closes our copy of it."""
    with socket.socket(fileno=fd) as theirs:
        if theirs.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        try:
            theirs.getpeername()
            theirs.shutdown(socket.SHUT_RDWR)
        except OSError:  # a listening socket, or one that was closed meanwhile
            return False
        return True


def _memory_groups() -> tuple[Path, str] | None:
    """The cgroup folder for memory limits and the name of the limit's file; None where it is not writable."""
    if (_CGROUPS / "memory/memory.limit_in_bytes").exists():  # version 1
        found = _CGROUPS / "memory", "memory.limit_in_bytes"
    elif "memory" in _read(_CGROUPS / "cgroup.subtree_control"):
        found = _CGROUPS, "memory.max"
    else:
        return None
    return found if os.access(found[0], os.W_OK) else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def can_limit_memory() -> bool:
    """Whether this process may put others into a cgroup with a memory limit."""
    return _memory_groups() is not None


def limit_memory(pid: int) -> None:
    """Forbid a process to take more memory: the kernel kills it when it needs another page.

    Raises OSError.
    """
    found = _memory_groups()
    if found is None:
        raise OSError("no writable cgroup with a memory limit here")
    folder, limit = found
    group = folder / f"phalanx-chaos-{pid}"
    group.mkdir(exist_ok=True)
    (group / limit).write_text(str(_LIMIT_BYTES))
    (group / "cgroup.procs").write_text(str(pid))


def forget_limits() -> None:
    """Remove the cgroups of processes that have ended."""
    if found := _memory_groups():
        for group in found[0].glob("phalanx-chaos-*"):
            with contextlib.suppress(OSError):  # not yet empty
                group.rmdir()
