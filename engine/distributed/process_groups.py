"""Groups over torch.distributed: NCCL between GPUs, gloo over TCP otherwise."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined] # re-exported silently


class ProcessGroupTensorParallel:
    """A tensor parallel group over a process group."""

    def __init__(self, group: Any, ranks: int, device: torch.device) -> None:
        self._group, self._ranks, self._device = group, ranks, device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks. On CPUs: added in float32, in rank order."""
        if self._device.type != "cpu":
            self._group.allreduce([x]).wait()
            return x
        total, *others = (part.float() for part in self._gather(x))
        for other in others:
            total += other
        return total.to(x.dtype)

    def gather_columns(self, x_SV: torch.Tensor) -> torch.Tensor:
        """All-gather along the columns."""
        return torch.cat(self._gather(x_SV), dim=1)

    def leave(self) -> None:
        """Do nothing: the connections break when the process ends."""

    def _gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(x) for _ in range(self._ranks)]
        self._group.allgather([parts], [x]).wait()
        return parts


class ProcessGroupStageLink:
    """A stage link over a process group of two ranks: rank 0 sends, rank 1 receives."""

    def __init__(self, group: Any, max_in_flight: int, device: torch.device) -> None:
        self._group, self._max_in_flight, self._device = group, max_in_flight, device
        # Keeps each tensor alive until it is sent.
        self._sending: list[tuple[Any, torch.Tensor]] = []

    def send(self, x: torch.Tensor) -> None:
        """Send a tensor. Waits for the oldest one when more than `max_in_flight` are not sent yet."""
        self._sending = [(work, tensor) for work, tensor in self._sending if not work.is_completed()]
        self._sending.append((self._group.send([x], 1, 0), x))
        if len(self._sending) > self._max_in_flight:
            self._sending.pop(0)[0].wait()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Wait for the next tensor."""
        x = torch.empty(shape, dtype=dtype, device=self._device)
        self._group.recv([x], 0, 0).wait()
        return x

    def leave(self) -> None:
        """Do nothing: the connection breaks when the process ends."""


def new_process_group(
    store: Store, name: str, rank: int, ranks: int, host: str, timeout: timedelta, *, nccl: bool
) -> Any:
    """A process group of its own, apart from torch's global default group. All its ranks call this.

    Args:
        store: where the ranks meet.
        name: the group's name in the store.
        rank: this rank's number in the group.
        ranks: the size of the group.
        host: the address that gloo listens on.
        timeout: how long an operation may take.
        nccl: NCCL instead of gloo.
    """
    scope = PrefixStore(name, store)
    if nccl:
        nccl_options = dist.ProcessGroupNCCL.Options()
        nccl_options._timeout = timeout
        return dist.ProcessGroupNCCL(scope, rank, ranks, nccl_options)
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined] # has no public name
    # Without a device of its own, gloo listens on whatever address the host name resolves to.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(scope, rank, ranks, options)
