"""Copies between host and device do not make the host wait, and arrive in the order of the device's work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.kernels.transfer import after_device, from_device, to_device
from tests.device import GPU

pytestmark = pytest.mark.skipif(not GPU, reason="only CUDA is asynchronous")
CYCLES = 2_000_000_000  # of the GPU's clock: about a second of work


@pytest.fixture
def busy() -> Callable[[], bool]:
    """Queues a second of work on the GPU, and returns a function that tells whether it still runs."""
    # Allocating pinned memory may wait for the device; torch keeps these blocks for the test.
    from_device(to_device([3, 1, 2], torch.device("cuda")).long())()
    torch.cuda.synchronize()
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    torch.cuda._sleep(CYCLES)
    done.record()
    return lambda: not done.query()


def test_integers_go_to_a_busy_device_without_waiting(busy: Callable[[], bool]) -> None:
    tensor = to_device([3, 1, 2], torch.device("cuda"))
    assert busy(), "the host has waited for the device"
    assert (tensor.dtype, tensor.tolist()) == (torch.int32, [3, 1, 2])


def test_a_copy_to_the_host_comes_after_earlier_work_and_before_later_work(busy: Callable[[], bool]) -> None:
    tensor = torch.zeros(3, dtype=torch.int64, device="cuda")
    tensor += 7
    wait = from_device(tensor)
    tensor.fill_(9)
    assert busy(), "the host has waited for the device"
    assert wait() == [7, 7, 7]
    assert not busy()


def test_a_result_waits_for_the_device(busy: Callable[[], bool]) -> None:
    wait = after_device(torch.device("cuda"), busy)
    assert busy()
    assert wait() is False, "the device is done when the result is computed"
