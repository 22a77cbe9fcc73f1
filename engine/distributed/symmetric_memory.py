"""Torch's symmetric memory: GPU memory that all ranks of a group map, and the one-shot kernel over it."""

from __future__ import annotations

import secrets

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined] # re-exported silently

from engine.distributed.one_shot import PeerGpus


class TorchSymmetricMemory:
    """Implements `one_shot.PeerMemory`. Every rank of a tensor parallel group makes one.

    Only the first group of a process can use it: torch counts rendezvous per process, and ranks whose counts
    differ wait for each other for ever.
    """

    _used_by_this_process = False

    def __init__(self, store: Store, name: str, rank: int, ranks: int, device: torch.device) -> None:
        self._store = PrefixStore(f"{name}/symmetric", store)
        if rank == 0:  # torch's group names are global in a process, which may have several engines
            self._store.set("name", f"phalanx/{name}/{secrets.token_hex(8)}")
        self._name = self._store.get("name").decode()
        self._rank, self._ranks, self._device = rank, ranks, device

    def can_reach(self, peers: PeerGpus) -> bool:
        """Whether this process sees the GPUs of all ranks, and this rank's GPU can read from each of them."""
        if TorchSymmetricMemory._used_by_this_process:
            return False
        if not hasattr(torch.ops.symm_mem, "one_shot_all_reduce_copy"):
            return False
        visible = {
            str(torch.cuda.get_device_properties(index).uuid): index
            for index in range(torch.cuda.device_count())
        }
        own = visible[peers[self._rank]]
        return all(
            peer in visible and torch.cuda.can_device_access_peer(own, visible[peer])
            for peer in peers
            if peer != peers[self._rank]
        )

    def allocate(self, size: int) -> torch.Tensor:
        """`size` bytes that all ranks can map."""
        from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory

        # Torch finds the ranks through a registered group of this name. The group needs no connections.
        group = dist.ProcessGroup(self._store, self._rank, self._ranks)
        group._set_group_name(dist.distributed_c10d.GroupName(self._name))
        _register_process_group(dist.distributed_c10d.GroupName(self._name), group)
        _SymmetricMemory.set_group_info(self._name, self._rank, self._ranks, self._store)
        return _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self._device, self._name)

    def rendezvous(self, shared: torch.Tensor) -> None:
        """Map the memory of the others."""
        TorchSymmetricMemory._used_by_this_process = True
        from torch._C._distributed_c10d import _SymmetricMemory

        _SymmetricMemory.rendezvous(shared, self._name)

    def sum(self, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """One kernel: copy `x`, wait for all ranks, add, wait for all ranks."""
        total: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x, "sum", self._name)
        return total
