"""The rank grid of a replica and what its ranks say to each other about tensors.

`rank = pp_rank * tp_size + tp_rank`: a row of the grid is one pipeline stage, split over tensor
parallel ranks; a column passes activations from stage to stage. Groups are process group objects of
torch.distributed; its global default group is not used, so several engines fit in one process.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined] # re-exported silently

from engine.grid import Grid as Grid

TIMEOUT = timedelta(minutes=10)  # the slowest rank may still be loading; a dead one is noticed at once


class Parallel:
    """The collectives of one rank.

    Owns: its process groups. Does not own: the order of calls, which every rank takes from the plans.
    """

    def __init__(
        self, grid: Grid, world: Any = None, row: Any = None, *, on_host: bool = False, sharers: int = 1
    ) -> None:
        self.grid = grid
        self.sharers = sharers  # ranks on this rank's device, itself included
        self._world = world  # all ranks, for stage to stage; None when alone
        self._row = row  # this stage's tensor parallel ranks; None when tp == 1
        self._on_host = on_host  # gloo moves CPU memory
        self._sending: list[tuple[Any, torch.Tensor]] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the stage's tensor parallel ranks.

        Over gloo the parts are gathered and added in rank order: a ring would add them in an order that
        depends on an element's place, and a row's bits with it.
        """
        if self._row is None:
            return x
        if not self._on_host:
            self._row.allreduce([x]).wait()
            return x
        total, *others = self._gather(x)
        for other in others:
            total += other
        return total.to(x.device)

    def gather_vocab(self, logits_SV: torch.Tensor) -> torch.Tensor:
        """The stage's vocabulary slices side by side."""
        return logits_SV if self._row is None else torch.cat(self._gather(logits_SV), dim=1)

    def agree_on_least(self, value: int) -> int:
        """The least of a number over all ranks."""
        if self._world is None:
            return value
        x = torch.tensor([value], dtype=torch.int64)
        if not self._on_host:
            x = x.cuda()
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MIN)
        self._world.allreduce([x], options).wait()
        return int(x.item())

    def send_hidden(self, x_TD: torch.Tensor) -> None:
        """Pass activations to the next stage. Returns before they have arrived."""
        x_TD = x_TD.cpu() if self._on_host else x_TD.contiguous()
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        # The tensor is kept until it has left.
        self._sending.append((self._world.send([x_TD], self.grid.rank + self.grid.tp, 0), x_TD))
        if len(self._sending) > self.grid.pp:
            self._sending.pop(0)[0].wait()

    def recv_hidden(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Activations from the stage before. Both sides know their shape from the plan."""
        x_TD = torch.empty(shape, dtype=dtype, device="cpu" if self._on_host else device)
        self._world.recv([x_TD], self.grid.rank - self.grid.tp, 0).wait()
        return x_TD.to(device)

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.cpu() if self._on_host else x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.grid.tp)]
        self._row.allgather([parts], [x]).wait()
        return parts


def open_store(host: str) -> tuple[TCPStore, str]:
    """Rank 0's key-value store, listening on `host` only, and its `host:port`."""
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
    """Another rank's connection to it."""
    host, _, port = address.rpartition(":")
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=TIMEOUT)


def connect(grid: Grid, store: Store | None, host: str, device: torch.device) -> Parallel:
    """Form the groups: NCCL when every rank has its own GPU, gloo on `host` otherwise."""
    if grid.world == 1 or store is None:
        return Parallel(grid)
    devices = _devices(grid, store, device)
    nccl = "cpu" not in devices and len(set(devices)) == grid.world
    world = _group(store, "world", grid.rank, grid.world, host, nccl)
    row = None
    if grid.tp > 1:
        row = _group(store, f"row{grid.pp_rank}", grid.tp_rank, grid.tp, host, nccl)
    return Parallel(grid, world, row, on_host=not nccl, sharers=devices.count(devices[grid.rank]))


def _devices(grid: Grid, store: Store, device: torch.device) -> list[str]:
    """Every rank's device: the UUID of a GPU, or "cpu"."""
    uuid = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else "cpu"
    store.set(f"gpu/{grid.rank}", str(uuid))
    return [store.get(f"gpu/{rank}").decode() for rank in range(grid.world)]


def _group(store: Store, name: str, rank: int, size: int, host: str, nccl: bool) -> Any:
    scope = PrefixStore(name, store)
    if nccl:
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = TIMEOUT
        return dist.ProcessGroupNCCL(scope, rank, size, nccl_options)
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined] # has no public name
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]  # or it would listen anywhere
    options._timeout = TIMEOUT
    return dist.ProcessGroupGloo(scope, rank, size, options)
