"""Values arrive on host and device. tests/gpu/test_transfer.py tests the asynchronous copies of CUDA."""

from __future__ import annotations

import torch

from engine.kernels.transfer import after_device, from_device, to_device
from engine.plan import PENDING_TOKEN

CPU = torch.device("cpu")


def test_integers_arrive_on_the_device_as_int32() -> None:
    numbers = [0, -1, 5, PENDING_TOKEN, -(2**31)]
    tensor = to_device(numbers, CPU)
    assert (tensor.dtype, tensor.device, tensor.tolist()) == (torch.int32, CPU, numbers)
    assert to_device([], CPU).shape == (0,)


def test_a_copy_to_the_host_has_the_values_of_when_it_began() -> None:
    tensor = torch.tensor([3, 1, 2])
    wait = from_device(tensor)
    tensor.fill_(9)
    assert wait() == [3, 1, 2]


def test_a_result_is_passed_on() -> None:
    calls: list[int] = []
    wait = after_device(CPU, lambda: calls.append(1) or "result")  # type: ignore[func-returns-value]
    assert calls == [], "the wait computes it"
    assert (wait(), calls) == ("result", [1])
