"""Integers on their way between host and device, for which neither waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def to_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 on a device, after what it does at present."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int32, device=device)
    # Copied from other than pinned memory, torch would wait for the device.
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)


def from_device(numbers_N: torch.Tensor) -> Callable[[], list[int]]:
    """Begin to copy what a tensor will hold after what its device does at present; what is returned waits."""
    if numbers_N.device.type != "cuda":
        here = numbers_N.tolist()
        return lambda: here
    here_N = torch.empty(numbers_N.shape, dtype=numbers_N.dtype, pin_memory=True)
    here_N.copy_(numbers_N, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def wait() -> list[int]:
        arrived.synchronize()
        return here_N.tolist()

    return wait


def once_done(device: torch.device, result: Callable[[], T]) -> Callable[[], T]:
    """A result that is there when a device has done what it does at present."""
    if device.type != "cuda":
        return result
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def wait() -> T:
        done.synchronize()
        return result()

    return wait
