"""Ranks of one host talk through memory that they share; `kernels/shm.cpp` says how.

The memory has no name in any file system: ranks open it through the `/proc` entry of the rank that made it.
So nothing is left behind however they end, and no other user can open it. Where one rank of a group cannot,
being in another container or on another host, the whole group does without.
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

import torch
from torch.distributed import Store  # type: ignore[attr-defined] # re-exported silently

from engine.errors import EngineError

_log = logging.getLogger(__name__)

_FLAG_BYTES = 128
_ROW_SLOTS = 2
_ROW_SLOT_BYTES = 128 << 10  # summed at once: what ranks have written is still in their L2 caches
_LOST, _LATE = 1, 2


class _Group(ctypes.Structure):
    _fields_ = (
        ("memory", ctypes.c_void_p), ("lives", ctypes.c_void_p), ("others", ctypes.c_long),
        ("timeout_s", ctypes.c_long), ("slots", ctypes.c_long), ("slot_bytes", ctypes.c_long),
        ("rank", ctypes.c_int32), ("ranks", ctypes.c_int32), ("step", ctypes.c_uint32),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Layout:
    """A group's memory: a flag for each rank, then the slots of each that writes."""

    ranks: int
    writers: int
    slots: int
    slot_bytes: int

    @property
    def size(self) -> int:
        return self.ranks * _FLAG_BYTES + self.writers * self.slots * self.slot_bytes


class _End:
    """One rank's end of a group. Owns: the mapping and the descriptors of the other ranks' processes."""

    def __init__(
        self, memory: mmap.mmap, lives: Sequence[int], rank: int, layout: _Layout, timeout: timedelta
    ) -> None:
        self.ranks = layout.ranks
        self._memory = memory
        self._lives = (ctypes.c_int * len(lives))(*lives)
        weakref.finalize(self, _close, lives)
        self._group = _Group(
            ctypes.addressof(ctypes.c_char.from_buffer(memory)), ctypes.addressof(self._lives), len(lives),
            int(timeout.total_seconds()), layout.slots, layout.slot_bytes, rank, layout.ranks, 0,
        )  # fmt: skip

    def call(self, name: str, *arguments: int) -> None:
        """Do an operation. Raises EngineError when another rank ends meanwhile or never comes."""
        result = getattr(_library(), name)(ctypes.byref(self._group), *arguments)
        if result == _LOST:
            raise EngineError("RANK_LOST", "another rank of the replica has gone")
        if result == _LATE:
            raise EngineError(
                "RANK_LOST", f"another rank of the replica has not come in {self._group.timeout_s} s"
            )

    def leave(self) -> None:
        """Say that this rank ends."""
        _library().phalanx_shm_leave(ctypes.byref(self._group))


class SharedRow:
    """One rank's end of a row. Does not own: the order of calls, which is the same on every rank."""

    def __init__(self, end: _End) -> None:
        self._end = end

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, added in float32 in their order; in place where that is x's type."""
        total = (x if x.dtype is torch.float32 else x.float()).contiguous()
        self._end.call("phalanx_shm_sum", total.data_ptr(), total.numel())
        return total if x.dtype is torch.float32 else total.to(x.dtype)

    def gather_columns(self, x_SV: torch.Tensor) -> torch.Tensor:
        """The ranks' columns side by side."""
        x_SV = x_SV.contiguous()
        rows, columns = x_SV.shape
        out = torch.empty(rows, columns * self._end.ranks, dtype=x_SV.dtype)
        width = columns * x_SV.itemsize
        self._end.call("phalanx_shm_gather", x_SV.data_ptr(), out.data_ptr(), rows, width)
        return out

    def leave(self) -> None:
        """Say that this rank ends."""
        self._end.leave()


class SharedHop:
    """One rank's end of the way to the same column of the next stage."""

    def __init__(self, end: _End) -> None:
        self._end = end

    def send(self, x: torch.Tensor) -> None:
        """Pass a tensor on. Waits only while as many as may be in flight have not been received."""
        x = x.contiguous()
        self._end.call("phalanx_shm_send", x.data_ptr(), x.nbytes)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor."""
        x = torch.empty(shape, dtype=dtype)
        self._end.call("phalanx_shm_receive", x.data_ptr(), x.nbytes)
        return x

    def leave(self) -> None:
        """Say that this rank ends."""
        self._end.leave()


def share_row(store: Store, name: str, rank: int, ranks: int, timeout: timedelta) -> SharedRow | None:
    """A row through shared memory, or None where its ranks cannot share any; all of them call this."""
    end = _share(store, name, rank, _Layout(ranks, ranks, _ROW_SLOTS, _ROW_SLOT_BYTES), timeout)
    return None if end is None else SharedRow(end)


def share_hop(
    store: Store, name: str, rank: int, message_bytes: int, in_flight: int, timeout: timedelta
) -> SharedHop | None:
    """A way from rank 0 to rank 1 through shared memory, or None where they cannot share any.

    Args:
        store: where both meet.
        name: of the way, in the store.
        rank: 0 sends, 1 receives.
        message_bytes: the most that a message has. What no message has reached takes no memory.
        in_flight: messages that may be under way before a sender waits.
        timeout: how long one may wait for the other.
    """
    slots = 1 << (in_flight - 1).bit_length()
    slot_bytes = -(-message_bytes // _FLAG_BYTES) * _FLAG_BYTES
    end = _share(store, name, rank, _Layout(2, 1, slots, slot_bytes), timeout)
    return None if end is None else SharedHop(end)


def _share(store: Store, name: str, rank: int, layout: _Layout, timeout: timedelta) -> _End | None:
    """Map the memory that rank 0 makes, if every rank of the group can."""
    store.set(f"{name}/pid/{rank}", str(os.getpid()))
    made = _make(layout.size) if rank == 0 else None
    if rank == 0:
        store.set(f"{name}/memory", "" if made is None else _place(made))
    others = [int(store.get(f"{name}/pid/{other}")) for other in range(layout.ranks) if other != rank]
    place = store.get(f"{name}/memory").decode()
    memory: mmap.mmap | None = None
    lives: list[int] = []
    try:
        _library()
        memory = _map(place, layout.size)
        for pid in others:
            lives.append(os.pidfd_open(pid))
    except (OSError, AttributeError) as error:  # Python may have been built without pidfd_open
        if place.startswith(_boot_id()):
            _log.warning("%s: ranks go over TCP, since they cannot share memory: %s", name, error)
    store.set(f"{name}/mapped/{rank}", "yes" if len(lives) == len(others) else "no")
    agreed = all(store.get(f"{name}/mapped/{other}") == b"yes" for other in range(layout.ranks))
    if made is not None:
        os.close(made)
    if memory is None or not agreed:
        _close(lives)
        return None
    return _End(memory, lives, rank, layout, timeout)


def _make(size: int) -> int | None:
    """A descriptor of new memory, of which nothing is taken before it is written."""
    try:
        fd = os.memfd_create(f"phalanx-{secrets.token_hex(16)}")
        os.truncate(fd, size)
    except (OSError, AttributeError) as error:
        _log.warning("there is no memory for ranks to share: %s", error)
        return None
    return fd


def _place(fd: int) -> str:
    """This machine's boot, a path that leads to the memory, and what is found there."""
    path = f"/proc/{os.getpid()}/fd/{fd}"
    return f"{_boot_id()} {path} {os.readlink(path)}"


def _map(place: str, size: int) -> mmap.mmap:
    """The memory at a place. Raises OSError where this process cannot see it."""
    if not place:
        raise OSError("rank 0 of the group has made none")
    _, path, found = place.split(" ", 2)
    # In another container the path may lead to something else: the name tells, before that is opened.
    if os.readlink(path) != found:
        raise OSError(f"{path} leads to something else here")
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
    """Names this machine, and this boot of it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else "unknown"


@cache
def _library() -> Any:
    """`kernels/shm.cpp`. Raises OSError where it has not been built: elsewhere than on x86-64 Linux."""
    library = ctypes.CDLL(str(Path(__file__).parents[1] / "kernels" / "shm.so"))
    group, pointer, whole = ctypes.POINTER(_Group), ctypes.c_void_p, ctypes.c_long
    library.phalanx_shm_sum.argtypes = (group, pointer, whole)
    library.phalanx_shm_gather.argtypes = (group, pointer, pointer, whole, whole)
    library.phalanx_shm_send.argtypes = (group, pointer, whole)
    library.phalanx_shm_receive.argtypes = (group, pointer, whole)
    library.phalanx_shm_leave.argtypes = (group,)
    return library
