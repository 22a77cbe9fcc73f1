"""Groups whose ranks are processes of one host and exchange tensors through shared memory."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch.distributed import Store  # type: ignore[attr-defined] # re-exported silently

from engine.distributed.shared_memory import FLAG_BYTES, MemoryLayout, SharedMemory, share_memory

_SUM_SLOTS = 2
# Larger tensors are summed in parts of this size, which are still in L2 when the other ranks read them.
_SUM_SLOT_BYTES = 128 << 10


class SharedTensorParallel:
    """A tensor parallel group over shared memory."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, added in float32, in rank order. Overwrites a contiguous float32 `x`."""
        total = (x if x.dtype is torch.float32 else x.float()).contiguous()
        self._memory.call("phalanx_shm_sum", total.data_ptr(), total.numel())
        return total if x.dtype is torch.float32 else total.to(x.dtype)

    def gather_columns(self, x_SV: torch.Tensor) -> torch.Tensor:
        """All-gather along the columns."""
        x_SV = x_SV.contiguous()
        rows, columns = x_SV.shape
        out = torch.empty(rows, columns * self._memory.ranks, dtype=x_SV.dtype)
        row_bytes = columns * x_SV.itemsize
        self._memory.call("phalanx_shm_gather", x_SV.data_ptr(), out.data_ptr(), rows, row_bytes)
        return out

    def leave(self) -> None:
        """Tell the other ranks that this rank ends."""
        self._memory.leave()


class SharedStageLink:
    """One end of a stage link over shared memory."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory

    def send(self, x: torch.Tensor) -> None:
        """Send a tensor. Waits only while every slot holds a tensor that is not received yet."""
        x = x.contiguous()
        self._memory.call("phalanx_shm_send", x.data_ptr(), x.nbytes)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Wait for the next tensor."""
        x = torch.empty(shape, dtype=dtype)
        self._memory.call("phalanx_shm_receive", x.data_ptr(), x.nbytes)
        return x

    def leave(self) -> None:
        """Tell the other end that this rank ends."""
        self._memory.leave()


def open_tensor_parallel(
    store: Store, name: str, rank: int, ranks: int, timeout: timedelta
) -> SharedTensorParallel | None:
    """The group over shared memory, or None if its ranks cannot share any. All its ranks call this."""
    layout = MemoryLayout(ranks, ranks, _SUM_SLOTS, _SUM_SLOT_BYTES)
    memory = share_memory(store, name, rank, layout, timeout)
    return None if memory is None else SharedTensorParallel(memory)


def open_stage_link(
    store: Store, name: str, rank: int, max_tensor_bytes: int, max_in_flight: int, timeout: timedelta
) -> SharedStageLink | None:
    """A stage link over shared memory, or None if its two ranks cannot share any. Both ranks call this.

    Args:
        store: where both ranks agree.
        name: the link's name in the store.
        rank: 0 sends, 1 receives.
        max_tensor_bytes: maximum size of a tensor. Pages that no tensor reaches take no memory.
        max_in_flight: how many tensors may be sent and not yet received before a sender waits.
        timeout: how long one end may wait for the other.
    """
    slots = 1 << (max_in_flight - 1).bit_length()
    slot_bytes = -(-max_tensor_bytes // FLAG_BYTES) * FLAG_BYTES
    memory = share_memory(store, name, rank, MemoryLayout(2, 1, slots, slot_bytes), timeout)
    return None if memory is None else SharedStageLink(memory)
