"""What the ranks of a replica say to each other about tensors.

Groups are the rows of the rank grid, which are a stage's tensor parallel ranks, and the hops from a rank to
that of the same column in the next stage. Each group is of one of three kinds: NCCL where every rank of the
replica has its own GPU, with small sums of a row in one kernel where that can be; shared memory where its
ranks are on one host; gloo otherwise. The global default group of torch.distributed is not used, so several
engines fit in one process.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined] # re-exported silently

from engine.distributed.one_shot import SymmetricMemory, one_shot
from engine.distributed.shm import share_hop, share_row
from engine.grid import Grid as Grid

TIMEOUT = timedelta(minutes=10)  # the slowest rank may still be loading; a dead one is noticed at once


class Row(Protocol):
    """A stage's tensor parallel ranks."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks; `x` may be overwritten."""
        ...

    def gather_columns(self, x_SV: torch.Tensor) -> torch.Tensor:
        """The ranks' columns side by side."""
        ...

    def leave(self) -> None:
        """Tell the others that this rank ends, if that is quicker than its end."""
        ...


class Hop(Protocol):
    """From one stage to the next: one end sends, the other receives."""

    def send(self, x: torch.Tensor) -> None:
        """Pass a tensor on. Returns before it has arrived."""
        ...

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor."""
        ...

    def leave(self) -> None:
        """Tell the other end that this rank ends, if that is quicker than its end."""
        ...


class Parallel:
    """The collectives of one rank.

    Owns: its groups. Does not own: the order of calls, which every rank takes from the plans.
    """

    def __init__(
        self,
        grid: Grid,
        store: Store | None = None,
        row: Row | None = None,
        before: Hop | None = None,
        after: Hop | None = None,
        *,
        staged: bool = False,
        sharers: int = 1,
    ) -> None:
        self.grid = grid
        self.sharers = sharers  # ranks on this rank's device, itself included
        self._store = store
        self._row = row  # None when alone in it
        self._before, self._after = before, after  # None at the ends of the pipeline
        self._staged = staged  # activations are on a GPU, and the groups move CPU memory
        self._agreed = 0

    @property
    def on_device(self) -> bool:
        """Whether the device alone does them, so that they may be recorded with a step."""
        return not self._staged

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the stage's tensor parallel ranks; `x` may be overwritten.

        On CPUs it is added in rank order: a ring would add in an order that depends on an element's place,
        and a row's bits with it.
        """
        return x if self._row is None else self._back(self._row.all_reduce(self._out(x)), x.device)

    def gather_vocab(self, logits_SV: torch.Tensor) -> torch.Tensor:
        """The stage's vocabulary slices side by side."""
        if self._row is None:
            return logits_SV
        return self._back(self._row.gather_columns(self._out(logits_SV)), logits_SV.device)

    def agree_on_least(self, value: int) -> int:
        """The least of a number over all ranks. Slow: for the start."""
        if self._store is None:
            return value
        self._agreed += 1
        key = f"least/{self._agreed}"
        self._store.set(f"{key}/{self.grid.rank}", str(value))
        return min(int(self._store.get(f"{key}/{rank}")) for rank in range(self.grid.world))

    def send_hidden(self, x_TD: torch.Tensor) -> None:
        """Pass activations to the next stage. Returns before they have arrived."""
        assert self._after is not None
        self._after.send(self._out(x_TD))

    def recv_hidden(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Activations from the stage before. Both sides know their shape from the plan."""
        assert self._before is not None
        return self._back(self._before.receive(shape, dtype), device)

    def leave(self) -> None:
        """Tell the other ranks that this one ends; a process takes tens of milliseconds to be gone."""
        for group in (self._row, self._before, self._after):
            if group is not None:
                group.leave()

    def _out(self, x: torch.Tensor) -> torch.Tensor:
        return (x.cpu() if self._staged else x).contiguous()

    def _back(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        return x.to(device) if self._staged else x


class GroupRow:
    """A row over a process group."""

    def __init__(self, group: Any, ranks: int, device: torch.device) -> None:
        self._group, self._ranks = group, ranks
        self._device = device  # on CPUs sums are added in rank order

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        if self._device.type != "cpu":
            self._group.allreduce([x]).wait()
            return x
        total, *others = (part.float() for part in self._gather(x))
        for other in others:
            total += other
        return total.to(x.dtype)

    def gather_columns(self, x_SV: torch.Tensor) -> torch.Tensor:
        """The ranks' columns side by side."""
        return torch.cat(self._gather(x_SV), dim=1)

    def leave(self) -> None:
        """Nothing: its connections break as the process ends."""

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(x) for _ in range(self._ranks)]
        self._group.allgather([parts], [x]).wait()
        return parts


class GroupHop:
    """A hop over a process group of two."""

    def __init__(self, group: Any, in_flight: int, device: torch.device) -> None:
        self._group = group
        self._in_flight = in_flight
        self._device = device
        self._sending: list[tuple[Any, torch.Tensor]] = []

    def send(self, x: torch.Tensor) -> None:
        """Pass a tensor on."""
        self._sending = [(work, kept) for work, kept in self._sending if not work.is_completed()]
        # The tensor is kept until it has left.
        self._sending.append((self._group.send([x], 1, 0), x))
        if len(self._sending) > self._in_flight:
            self._sending.pop(0)[0].wait()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor."""
        x = torch.empty(shape, dtype=dtype, device=self._device)
        self._group.recv([x], 0, 0).wait()
        return x

    def leave(self) -> None:
        """Nothing: its connection breaks as the process ends."""


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


def connect(grid: Grid, store: Store | None, host: str, device: torch.device, hidden_bytes: int) -> Parallel:
    """Form this rank's groups; every rank of the replica calls this.

    Args:
        grid: this rank's place.
        store: where the ranks meet; None when alone.
        host: the address that gloo listens on.
        device: of this rank.
        hidden_bytes: the most that a stage passes on in a step.
    """
    if grid.world == 1 or store is None:
        return Parallel(grid)
    devices = _devices(grid, store, device)
    nccl = "cpu" not in devices and len(set(devices)) == grid.world
    where = device if nccl else torch.device("cpu")

    def row() -> Row:
        name, rank, ranks = f"row{grid.pp_rank}", grid.tp_rank, grid.tp
        shared = None if nccl else share_row(store, name, rank, ranks, TIMEOUT)
        over_group = shared or GroupRow(_group(store, name, rank, ranks, host, nccl), ranks, where)
        if not nccl:
            return over_group
        peers = devices[grid.rank - rank : grid.rank - rank + ranks]
        memory = SymmetricMemory(store, name, rank, ranks, device)
        return one_shot(over_group, memory, store, name, rank, peers)

    def hop(sender: int) -> Hop:
        name, rank = f"hop{sender}", int(grid.rank != sender)
        shared = None if nccl else share_hop(store, name, rank, hidden_bytes, grid.pp, TIMEOUT)
        return shared or GroupHop(_group(store, name, rank, 2, host, nccl), grid.pp, where)

    return Parallel(
        grid,
        store,
        row() if grid.tp > 1 else None,
        None if grid.is_first_stage else hop(grid.rank - grid.tp),
        None if grid.is_last_stage else hop(grid.rank),
        staged=device.type == "cuda" and not nccl,
        sharers=devices.count(devices[grid.rank]),
    )


def _devices(grid: Grid, store: Store, device: torch.device) -> list[str]:
    """Every rank's device: the UUID of a GPU, or "cpu"."""
    uuid = torch.cuda.get_device_properties(device).uuid if device.type == "cuda" else "cpu"
    store.set(f"gpu/{grid.rank}", str(uuid))
    return [store.get(f"gpu/{rank}").decode() for rank in range(grid.world)]


def _group(store: Store, name: str, rank: int, ranks: int, host: str, nccl: bool) -> Any:
    scope = PrefixStore(name, store)
    if nccl:
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = TIMEOUT
        return dist.ProcessGroupNCCL(scope, rank, ranks, nccl_options)
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined] # has no public name
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]  # or it would listen anywhere
    options._timeout = TIMEOUT
    return dist.ProcessGroupGloo(scope, rank, ranks, options)
