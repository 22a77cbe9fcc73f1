"""Memory that the ranks of a group share, as processes of one host, and the calls of `kernels/shm.cpp` on it.

The memory is a memfd of the group's rank 0. It has no name in any file system: the other ranks open it
through `/proc/<pid>/fd/<n>` of rank 0. So nothing is left behind however the ranks end, and no other user can
open it. If one rank cannot open it, because it runs in another container or on another host, no rank of the
group uses it.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined] # re-exported silently

from engine.errors import EngineError

_log = logging.getLogger(__name__)

FLAG_BYTES = 128
_RANK_GONE, _TIMED_OUT = 1, 2  # `Result` in shm.cpp


class _Group(ctypes.Structure):
    """`Group` in shm.cpp."""

    _fields_ = (
        ("memory", ctypes.c_void_p), ("pidfds", ctypes.c_void_p), ("num_pidfds", ctypes.c_long),
        ("timeout_s", ctypes.c_long), ("slots", ctypes.c_long), ("slot_bytes", ctypes.c_long),
        ("rank", ctypes.c_int32), ("ranks", ctypes.c_int32), ("step", ctypes.c_uint32),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MemoryLayout:
    """What a group's memory holds: one flag per rank, then `slots` slots for each rank that writes."""

    ranks: int
    writers: int
    slots: int
    slot_bytes: int

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.ranks * FLAG_BYTES + self.writers * self.slots * self.slot_bytes


class SharedMemory:
    """One rank's view of its group's memory.

    Owns: the mapping, and a pidfd of every other rank, which tells when that process ends.
    Does not own: what the slots mean.
    """

    def __init__(
        self, memory: mmap.mmap, pidfds: Sequence[int], rank: int, layout: MemoryLayout, timeout: timedelta
    ) -> None:
        self.ranks = layout.ranks
        self._memory = memory
        self._pidfds = (ctypes.c_int * len(pidfds))(*pidfds)
        weakref.finalize(self, _close, pidfds)
        self._group = _Group(
            ctypes.addressof(ctypes.c_char.from_buffer(memory)), ctypes.addressof(self._pidfds), len(pidfds),
            int(timeout.total_seconds()), layout.slots, layout.slot_bytes, rank, layout.ranks, 0,
        )  # fmt: skip

    def call(self, function: str, *arguments: int) -> None:
        """Run a function of shm.cpp.

        Raises:
            EngineError: RANK_LOST, when another rank ends meanwhile or does not come within the timeout.
        """
        result = getattr(_library(), function)(ctypes.byref(self._group), *arguments)
        if result == _RANK_GONE:
            raise EngineError("RANK_LOST", "another rank of the replica has gone")
        if result == _TIMED_OUT:
            raise EngineError(
                "RANK_LOST", f"another rank of the replica has not come in {self._group.timeout_s} s"
            )

    def leave(self) -> None:
        """Tell the other ranks that this rank ends."""
        _library().phalanx_shm_leave(ctypes.byref(self._group))


def share_memory(
    store: Store, name: str, rank: int, layout: MemoryLayout, timeout: timedelta
) -> SharedMemory | None:
    """Map the memory of a group, or None if one of its ranks cannot. Every rank of the group calls this.

    Args:
        store: where the ranks agree.
        name: the group's name in the store.
        rank: this rank's number in the group; rank 0 makes the memory.
        layout: the same on every rank.
        timeout: how long a rank may wait for another in an operation.
    """
    store.set(f"{name}/pid/{rank}", str(os.getpid()))
    memfd = _create(layout.size) if rank == 0 else None
    if rank == 0:
        store.set(f"{name}/memory", "" if memfd is None else _location(memfd))
    peers = [int(store.get(f"{name}/pid/{other}")) for other in range(layout.ranks) if other != rank]
    location = store.get(f"{name}/memory").decode()
    memory: mmap.mmap | None = None
    pidfds: list[int] = []
    try:
        _library()
        memory = _map(location, layout.size)
        for pid in peers:
            pidfds.append(os.pidfd_open(pid))
    except (OSError, AttributeError) as error:  # Python may have been built without pidfd_open
        if location.startswith(_boot_id()):
            _log.warning("%s: ranks go over TCP, since they cannot share memory: %s", name, error)
    store.set(f"{name}/mapped/{rank}", "yes" if len(pidfds) == len(peers) else "no")
    all_mapped = all(store.get(f"{name}/mapped/{other}") == b"yes" for other in range(layout.ranks))
    if memfd is not None:
        os.close(memfd)
    if memory is None or not all_mapped:
        _close(pidfds)
        return None
    return SharedMemory(memory, pidfds, rank, layout, timeout)


def _create(size: int) -> int | None:
    """A memfd. It takes no memory for a page until that page is first written."""
    try:
        fd = os.memfd_create(f"phalanx-{secrets.token_hex(16)}")
        os.truncate(fd, size)
    except (OSError, AttributeError) as error:
        _log.warning("there is no memory for ranks to share: %s", error)
        return None
    return fd


def _location(fd: int) -> str:
    """Three words: this host's boot id, the path of the memfd in /proc, and what that link points to."""
    path = f"/proc/{os.getpid()}/fd/{fd}"
    return f"{_boot_id()} {path} {os.readlink(path)}"


def _map(location: str, size: int) -> mmap.mmap:
    """Map the memory at a location. Raises OSError where this process cannot open it."""
    if not location:
        raise OSError("rank 0 of the group has no memory to share")
    _, path, target = location.split(" ", 2)
    # In another container the same path may lead to another file. Compare the link before opening it.
    if os.readlink(path) != target:
        raise OSError(f"{path} is another file in this process")
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


@cache
def _boot_id() -> str:
    """Identifies this host, and its current boot."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "unknown"


@cache
def _library() -> Any:
    """The compiled `kernels/shm.cpp`. Raises OSError where it is not built: only x86-64 Linux builds it."""
    library = ctypes.CDLL(str(Path(__file__).parents[1] / "kernels" / "shm.so"))
    group, pointer, long = ctypes.POINTER(_Group), ctypes.c_void_p, ctypes.c_long
    library.phalanx_shm_sum.argtypes = (group, pointer, long)
    library.phalanx_shm_gather.argtypes = (group, pointer, pointer, long, long)
    library.phalanx_shm_send.argtypes = (group, pointer, long)
    library.phalanx_shm_receive.argtypes = (group, pointer, long)
    library.phalanx_shm_leave.argtypes = (group,)
    return library
