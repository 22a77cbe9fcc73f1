"""Sums of a few rows over the GPUs of one host: a rank reads the others' parts where they lie, in one kernel.

A decode step sums a few KB twice per layer, and NCCL's time for that is in its steps, not in the bytes. Here
a rank copies its part into memory that all map ("symmetric memory"), waits until all have, and adds all parts
in the order of ranks. Torch has the memory and the kernel, neither with an interface that is promised to
stay. So a row does it only where every rank is able to, and has found NCCL's sums equal to these.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined] # re-exported silently

from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.distributed.parallel import Row

T = TypeVar("T")
_log = logging.getLogger(__name__)

_MOST_BYTES = {2: 1 << 20, 4: 512 << 10, 8: 256 << 10}
"""Of a message, by ranks: each reads the parts of all, where a ring reads less than two. Beyond, NCCL sums.
Fixed, not measured at each start: with more than two ranks, bits depend on the order of additions."""
_DTYPES = (torch.bfloat16, torch.float32)  # that torch's kernel knows
_SWITCH = "PHALANX_ONE_SHOT"  # 0 turns it off

Peers = Sequence[str]
"""The GPU of each rank of a row: its UUID."""


class Memory(Protocol):
    """Memory of one rank that the others of its row read."""

    def reach(self, peers: Peers) -> bool:
        """Whether this rank could read the memory of all others. Waits for nobody."""
        ...

    def allocate(self, size: int) -> torch.Tensor:
        """`size` bytes. Waits for nobody."""
        ...

    def meet(self, shared: torch.Tensor) -> None:
        """See the memory of the others, when all have allocated; all ranks call this."""
        ...

    def sum(self, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`, which passes through `shared`, of its shape and type."""
        ...


class OneShotRow:
    """A row whose small sums take one kernel. Does not own: the order of calls, the same on every rank."""

    def __init__(self, row: Row, memory: Memory, shared: torch.Tensor) -> None:
        self.shared = shared
        self._row, self._memory = row, memory

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        if x.nbytes > self.shared.nbytes or x.dtype not in _DTYPES or x.storage_offset():
            return self._row.all_reduce(x)
        return self._memory.sum(self.shared[: x.nbytes].view(x.dtype).view(x.shape), x)

    def gather_columns(self, x_SV: torch.Tensor) -> torch.Tensor:
        """The ranks' columns side by side."""
        return self._row.gather_columns(x_SV)

    def leave(self) -> None:
        """Tell the others that this rank ends."""
        self._row.leave()


def one_shot(row: Row, memory: Memory, store: Store, name: str, rank: int, peers: Peers) -> Row:
    """The row with its small sums done in one kernel, if all its ranks can; all of them call this.

    Args:
        row: as it is.
        memory: of this rank.
        store: where the ranks agree.
        name: of the row, in the store.
        rank: in the row.
        peers: of the row.

    Raises:
        EngineError: this rank failed where others wait for it.
    """

    def agreed(step: str, able: bool) -> bool:
        store.set(f"{name}/{step}/{rank}", "yes" if able else "no")
        return all(store.get(f"{name}/{step}/{other}") == b"yes" for other in range(len(peers)))

    def tried(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except Exception as error:  # nobody says what torch may raise here, and NCCL does without
            _log.warning("%s: sums go through NCCL: %r", name, error)
            return None

    # No rank waits for others in what follows before all are able to.
    wanted = os.environ.get(_SWITCH, "1") != "0" and len(peers) in _MOST_BYTES
    if not agreed("reach", wanted and bool(tried(lambda: memory.reach(peers)))):
        return row
    shared = tried(lambda: memory.allocate(_MOST_BYTES[len(peers)]))
    if not agreed("allocate", shared is not None) or shared is None:
        return row
    quick = OneShotRow(row, memory, shared)
    try:
        memory.meet(shared)
        equal = _equal(quick, row, rank)
    except Exception as error:  # the others wait for this rank, and only its end wakes them
        message = f"GPUs cannot share memory: {error!r}; {_SWITCH}=0 leaves sums to NCCL"
        raise EngineError("INTERNAL", message) from error
    if not agreed("equal", equal):
        _log.warning("%s: sums go through NCCL, since those in one kernel differ", name)
        return row
    _log.info("%s: small sums are done in one kernel", name)
    return quick


def _equal(quick: OneShotRow, row: Row, rank: int) -> bool:
    """Whether two rows' sums are equal, of numbers so small that they are exact in any order."""
    equal = True
    for dtype in _DTYPES:
        for size in (8, 4096, quick.shared.nbytes // dtype.itemsize):
            x = (torch.arange(size, device=quick.shared.device) * (rank + 1) % 11).to(dtype)
            equal &= torch.equal(quick.all_reduce(x), row.all_reduce(x.clone()))
    return equal


class SymmetricMemory:
    """Torch's: memory of GPUs that reach each other. Every rank of a row makes one.

    Once in a process: torch counts its meetings there, and ranks whose counts differ wait in vain.
    """

    _used = False

    def __init__(self, store: Store, name: str, rank: int, ranks: int, device: torch.device) -> None:
        self._store = PrefixStore(f"{name}/symmetric", store)
        if rank == 0:  # a process may have several engines, and torch's names are those of the process
            self._store.set("name", f"phalanx/{name}/{secrets.token_hex(8)}")
        self._name = self._store.get("name").decode()
        self._rank, self._ranks, self._device = rank, ranks, device

    def reach(self, peers: Peers) -> bool:
        """Whether this rank sees the GPUs of all, and they each other."""
        if SymmetricMemory._used or not hasattr(torch.ops.symm_mem, "one_shot_all_reduce_copy"):
            return False
        visible = {
            str(torch.cuda.get_device_properties(index).uuid): index
            for index in range(torch.cuda.device_count())
        }
        mine = visible[peers[self._rank]]
        return all(
            peer in visible and torch.cuda.can_device_access_peer(mine, visible[peer])
            for peer in peers
            if peer != peers[self._rank]
        )

    def allocate(self, size: int) -> torch.Tensor:
        """`size` bytes that all ranks can map."""
        from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory

        # The ranks find each other by a group that is known by its name; it needs no connections of its own.
        group = dist.ProcessGroup(self._store, self._rank, self._ranks)
        group._set_group_name(dist.distributed_c10d.GroupName(self._name))
        _register_process_group(dist.distributed_c10d.GroupName(self._name), group)
        _SymmetricMemory.set_group_info(self._name, self._rank, self._ranks, self._store)
        return _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self._device, self._name)

    def meet(self, shared: torch.Tensor) -> None:
        """Map the memory of the others."""
        SymmetricMemory._used = True
        from torch._C._distributed_c10d import _SymmetricMemory

        _SymmetricMemory.rendezvous(shared, self._name)

    def sum(self, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """One kernel: copy, wait for all, add, wait for all."""
        total: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x, "sum", self._name)
        return total
