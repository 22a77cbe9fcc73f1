"""Where the ranks of a replica meet, and which transport each of their groups gets.

The transport of a group, best first:

1. NCCL, where every rank of the replica has a GPU of its own. In a tensor parallel group, small sums take one
   kernel instead, where the GPUs allow it (`one_shot.py`).
2. Shared memory, where the ranks of the group are processes of one host (`shared_memory.py`).
3. gloo over TCP.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined] # re-exported silently

from engine.distributed.groups import StageLink, TensorParallelGroup
from engine.distributed.one_shot import with_one_shot_sums
from engine.distributed.parallel import Parallel
from engine.distributed.process_groups import (
    ProcessGroupStageLink,
    ProcessGroupTensorParallel,
    new_process_group,
)
from engine.distributed.shared_memory_groups import open_stage_link, open_tensor_parallel
from engine.distributed.symmetric_memory import TorchSymmetricMemory
from engine.grid import Grid

TIMEOUT = timedelta(minutes=10)  # the slowest rank may still be loading; a dead rank is noticed at once


def open_store(host: str) -> tuple[TCPStore, str]:
    """Rank 0's key-value store, which listens on `host` only, and its `host:port`."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=TIMEOUT,
        master_listen_fd=listener.detach(),
    )
    return store, f"{host}:{port}"


def join_store(address: str) -> TCPStore:
    """Another rank's connection to rank 0's store."""
    host, _, port = address.rpartition(":")
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=TIMEOUT)


def connect(grid: Grid, store: Store | None, host: str, device: torch.device, hidden_bytes: int) -> Parallel:
    """Form this rank's groups. Every rank of the replica calls this.

    Args:
        grid: the layout, and this rank's place in it.
        store: where the ranks meet; None for a replica of one rank.
        host: the address that gloo listens on.
        device: this rank's device.
        hidden_bytes: maximum size of the activations that a stage sends in a step.
    """
    if grid.world == 1 or store is None:
        return Parallel(grid)
    devices = _all_devices(grid, store, device)
    nccl = "cpu" not in devices and len(set(devices)) == grid.world
    group_device = device if nccl else torch.device("cpu")

    def tensor_parallel() -> TensorParallelGroup:
        name, rank, ranks = f"tp{grid.pp_rank}", grid.tp_rank, grid.tp
        shared = None if nccl else open_tensor_parallel(store, name, rank, ranks, TIMEOUT)
        if shared is not None:
            return shared
        process_group = new_process_group(store, name, rank, ranks, host, TIMEOUT, nccl=nccl)
        group = ProcessGroupTensorParallel(process_group, ranks, group_device)
        if not nccl:
            return group
        peers = devices[grid.rank - rank : grid.rank - rank + ranks]
        memory = TorchSymmetricMemory(store, name, rank, ranks, device)
        return with_one_shot_sums(group, memory, store, name, rank, peers)

    def stage_link(sender: int) -> StageLink:
        name, rank = f"stage-link{sender}", int(grid.rank != sender)
        shared = None if nccl else open_stage_link(store, name, rank, hidden_bytes, grid.pp, TIMEOUT)
        if shared is not None:
            return shared
        process_group = new_process_group(store, name, rank, 2, host, TIMEOUT, nccl=nccl)
        return ProcessGroupStageLink(process_group, grid.pp, group_device)

    return Parallel(
        grid,
        store,
        tensor_parallel() if grid.tp > 1 else None,
        None if grid.is_first_stage else stage_link(grid.rank - grid.tp),
        None if grid.is_last_stage else stage_link(grid.rank),
        copies_through_host=device.type == "cuda" and not nccl,
        ranks_on_device=devices.count(devices[grid.rank]),
    )


def _all_devices(grid: Grid, store: Store, device: torch.device) -> list[str]:
    """Every rank's device, by rank: the UUID of a GPU, or "cpu"."""
    uuid = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else "cpu"
    store.set(f"gpu/{grid.rank}", str(uuid))
    return [store.get(f"gpu/{rank}").decode() for rank in range(grid.world)]
