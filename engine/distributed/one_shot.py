"""All-reduce of small tensors between the GPUs of one host in one kernel ("one-shot all-reduce").

A decode step sums a few KB twice per layer. NCCL's time for that is latency, not bandwidth. Here every rank
copies its part into memory that all ranks map, waits until all have, and adds all parts in rank order.

Torch has the memory and the kernel (`symmetric_memory.py`), but promises neither interface. So a group uses
them only if every rank can, and after it has found the sums equal to NCCL's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch.distributed import Store  # type: ignore[attr-defined] # re-exported silently

from engine.distributed.groups import TensorParallelGroup
from engine.errors import EngineError

T = TypeVar("T")
_log = logging.getLogger(__name__)

_MAX_BYTES = {2: 1 << 20, 4: 512 << 10, 8: 256 << 10}
"""Maximum size of a tensor, by the number of ranks. Larger tensors go through NCCL: in a one-shot sum, every
rank reads the parts of all ranks; in NCCL's ring it reads less than two. The limits are constants, not
measured at each start: the two ways add in different orders, so a switch may change a sum's bits."""
_DTYPES = (torch.bfloat16, torch.float32)  # that torch's kernel supports
_SWITCH = "PHALANX_ONE_SHOT"  # an environment variable; 0 turns one-shot sums off

PeerGpus = Sequence[str]
"""The UUID of each rank's GPU, by rank of a tensor parallel group."""


class PeerMemory(Protocol):
    """Memory of this rank that the other ranks of its group read."""

    def can_reach(self, peers: PeerGpus) -> bool:
        """Whether this rank can read the memory of all others. Waits for no rank."""
        ...

    def allocate(self, size: int) -> torch.Tensor:
        """`size` bytes. Waits for no rank."""
        ...

    def rendezvous(self, shared: torch.Tensor) -> None:
        """Map the memory of the others. All ranks call this after all have allocated."""
        ...

    def sum(self, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`. Copies `x` to `shared`, which has the same shape and dtype."""
        ...


class OneShotTensorParallel:
    """A tensor parallel group whose small sums take one kernel. All else goes to the group that it wraps."""

    def __init__(self, group: TensorParallelGroup, memory: PeerMemory, shared: torch.Tensor) -> None:
        self.shared = shared
        self._group, self._memory = group, memory

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        # A tensor with an offset may not be aligned as the kernel needs.
        if x.nbytes > self.shared.nbytes or x.dtype not in _DTYPES or x.storage_offset():
            return self._group.all_reduce(x)
        return self._memory.sum(self.shared[: x.nbytes].view(x.dtype).view(x.shape), x)

    def gather_columns(self, x_SV: torch.Tensor) -> torch.Tensor:
        """All-gather along the columns."""
        return self._group.gather_columns(x_SV)

    def leave(self) -> None:
        """Tell the other ranks that this rank ends."""
        self._group.leave()


def with_one_shot_sums(
    group: TensorParallelGroup, memory: PeerMemory, store: Store, name: str, rank: int, peers: PeerGpus
) -> TensorParallelGroup:
    """The group with one-shot sums if every rank supports them, else the same group. All its ranks call this.

    Args:
        group: the group, over NCCL.
        memory: this rank's.
        store: where the ranks agree.
        name: the group's name in the store.
        rank: this rank's number in the group.
        peers: the GPUs of the group.

    Raises:
        EngineError: this rank failed where the other ranks wait for it.
    """

    def all_agree(step: str, able: bool) -> bool:
        store.set(f"{name}/{step}/{rank}", "yes" if able else "no")
        return all(store.get(f"{name}/{step}/{other}") == b"yes" for other in range(len(peers)))

    def attempt(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except Exception as error:  # torch does not document what it raises here; NCCL still works
            _log.warning("%s: sums go through NCCL: %r", name, error)
            return None

    # No rank may wait for another inside torch before all ranks have said that they can go on.
    wanted = os.environ.get(_SWITCH, "1") != "0" and len(peers) in _MAX_BYTES
    if not all_agree("reach", wanted and bool(attempt(lambda: memory.can_reach(peers)))):
        return group
    shared = attempt(lambda: memory.allocate(_MAX_BYTES[len(peers)]))
    if not all_agree("allocate", shared is not None) or shared is None:
        return group
    one_shot = OneShotTensorParallel(group, memory, shared)
    try:
        memory.rendezvous(shared)
        equal = _sums_are_equal(one_shot, group, rank)
    except Exception as error:  # the other ranks wait inside torch: only the end of this process wakes them
        message = f"GPUs cannot share memory: {error!r}; {_SWITCH}=0 leaves sums to NCCL"
        raise EngineError("INTERNAL", message) from error
    if not all_agree("equal", equal):
        _log.warning("%s: sums go through NCCL: one-shot sums differ from NCCL's", name)
        return group
    _log.info("%s: small sums go through the one-shot kernel", name)
    return one_shot


def _sums_are_equal(one_shot: OneShotTensorParallel, group: TensorParallelGroup, rank: int) -> bool:
    """Whether both groups compute the same sums of small integers, which are exact in any order."""
    equal = True
    for dtype in _DTYPES:
        for size in (8, 4096, one_shot.shared.nbytes // dtype.itemsize):
            x = (torch.arange(size, device=one_shot.shared.device) * (rank + 1) % 11).to(dtype)
            equal &= torch.equal(one_shot.all_reduce(x), group.all_reduce(x.clone()))
    return equal
