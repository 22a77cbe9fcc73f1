"""Copies integers between host and device without blocking either of them.

Only CUDA copies asynchronously. On any other device, every function copies at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def to_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Copy integers to an int32 tensor on a device, in order with the work queued there."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int32, device=device)
    # A copy from memory that is not pinned makes the host wait for the device.
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)


def from_device(numbers_N: torch.Tensor) -> Callable[[], list[int]]:
    """Start to copy a tensor to the host, after the work queued on its device.

    Returns a function that waits for the copy and returns the numbers. Work queued later may overwrite the
    tensor.
    """
    if numbers_N.device.type != "cuda":
        numbers = numbers_N.tolist()
        return lambda: numbers
    on_host_N = torch.empty(numbers_N.shape, dtype=numbers_N.dtype, pin_memory=True)
    on_host_N.copy_(numbers_N, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def wait() -> list[int]:
        copied.synchronize()
        return on_host_N.tolist()

    return wait


def after_device(device: torch.device, result: Callable[[], T]) -> Callable[[], T]:
    """Delay `result`: the returned function first waits for the work that is queued on the device now."""
    if device.type != "cuda":
        return result
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def wait() -> T:
        done.synchronize()
        return result()

    return wait
