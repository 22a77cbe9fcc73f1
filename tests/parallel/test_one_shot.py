"""One-shot sums on CPUs: shared memory stands in for GPU memory that other GPUs can read."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch.distributed import Store

from engine.distributed.groups import TensorParallelGroup
from engine.distributed.one_shot import OneShotTensorParallel, PeerGpus, with_one_shot_sums
from engine.distributed.shared_memory_groups import open_tensor_parallel
from engine.distributed.symmetric_memory import TorchSymmetricMemory
from engine.errors import EngineError
from tests.parallel.processes import run

TIMEOUT = timedelta(seconds=30)
MAX_BYTES = {2: 1 << 20, 4: 512 << 10}


class Memory:
    """Replaces the kernel by a sum over another group. `fault` is the call that fails on this rank."""

    def __init__(self, store: Store, rank: int, ranks: int, fault: str) -> None:
        group = open_tensor_parallel(store, "stand-in", rank, ranks, TIMEOUT)
        assert group is not None
        self._group, self._fault = group, fault
        self.sums: list[int] = []

    def can_reach(self, peers: PeerGpus) -> bool:
        return self._fault != "can_reach"

    def allocate(self, size: int) -> torch.Tensor:
        if self._fault == "allocate":
            raise TypeError("empty_strided_p2p(): incompatible function arguments")
        return torch.zeros(size, dtype=torch.uint8)

    def rendezvous(self, shared: torch.Tensor) -> None:
        if self._fault == "rendezvous":
            raise RuntimeError("CUDA driver error: peer access is not supported")

    def sum(self, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert shared.shape == x.shape
        assert shared.dtype is x.dtype
        self.sums.append(x.nbytes)
        shared.copy_(x)
        return self._group.all_reduce(shared.clone()) + (self._fault == "sum")


def groups(
    store: Store, rank: int, ranks: int, fault: str = ""
) -> tuple[TensorParallelGroup, TensorParallelGroup, Memory]:
    """A group, the same group with one-shot sums if all its ranks support them, and the shared memory."""
    group = open_tensor_parallel(store, "tp", rank, ranks, TIMEOUT)
    assert group is not None
    memory = Memory(store, rank, ranks, fault)
    peers = [f"GPU-{other}" for other in range(ranks)]
    return group, with_one_shot_sums(group, memory, store, "tp", rank, peers), memory


def add(rank: int, ranks: int, store: Store) -> list[int]:
    """Sums of many sizes and dtypes; returns the sizes in bytes of the one-shot sums."""
    _, one_shot, memory = groups(store, rank, ranks)
    trials = len(memory.sums)
    largest = MAX_BYTES[ranks]
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for rows_of_it in (1, 3, largest // (64 * dtype.itemsize), largest // (64 * dtype.itemsize) + 1):
            x = torch.full((rows_of_it, 64), rank + 1, dtype=dtype)
            total = one_shot.all_reduce(x)
            assert total.shape == x.shape
            assert total.dtype is dtype
            assert bool((total == sum(range(1, ranks + 1))).all())
    part = torch.ones(200)[4:]  # not aligned as the kernel needs
    assert bool((one_shot.all_reduce(part) == ranks).all())
    assert (
        one_shot.gather_columns(torch.full((2, 3), rank)).tolist()
        == [[other for other in range(ranks) for _ in range(3)]] * 2
    )
    return memory.sums[trials:]


@pytest.mark.parametrize("ranks", [2, 4])
def test_small_sums_take_the_quick_way_and_all_are_right(ranks: int) -> None:
    maximum = MAX_BYTES[ranks]
    assert run(add, ranks) == [[128, 384, maximum, 256, 768, maximum]] * ranks


def with_a_fault(rank: int, ranks: int, store: Store, fault: str, faulty: int) -> bool:
    group, chosen, _ = groups(store, rank, ranks, fault if rank == faulty else "")
    assert bool((chosen.all_reduce(torch.ones(100)) == ranks).all())
    return chosen is group


@pytest.mark.parametrize("fault", ["can_reach", "allocate", "sum"])
@pytest.mark.parametrize("faulty", [0, 1])
def test_if_one_rank_is_not_able_none_takes_it(fault: str, faulty: int) -> None:
    assert run(with_a_fault, 2, fault, faulty) == [True, True]


def failing_to_meet(rank: int, ranks: int, store: Store) -> str:
    with pytest.raises(EngineError, match="PHALANX_ONE_SHOT=0") as failed:
        groups(store, rank, ranks, "rendezvous")
    return failed.value.reason


def test_a_rank_that_fails_where_others_wait_for_it_ends_and_says_what_to_do() -> None:
    assert run(failing_to_meet, 2) == ["INTERNAL"] * 2


def as_many_ranks(rank: int, ranks: int, store: Store) -> bool:
    return isinstance(groups(store, rank, ranks)[1], OneShotTensorParallel)


def test_a_number_of_ranks_that_the_kernel_does_not_know_goes_on_as_before() -> None:
    assert run(as_many_ranks, 3) == [False] * 3


def switched_off_at_rank_1(rank: int, ranks: int, store: Store) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHALANX_ONE_SHOT", "01"[rank == 0])
        return isinstance(groups(store, rank, ranks)[1], OneShotTensorParallel)


def test_it_can_be_switched_off() -> None:
    assert run(switched_off_at_rank_1, 2) == [False, False]


class OfCpus(TorchSymmetricMemory):
    """Torch's symmetric memory is for GPUs only. On a CPU `allocate` fails."""

    def can_reach(self, peers: PeerGpus) -> bool:
        return True


def without_gpus(rank: int, ranks: int, store: Store) -> bool:
    group = open_tensor_parallel(store, "tp", rank, ranks, TIMEOUT)
    assert group is not None
    memory = OfCpus(store, "tp", rank, ranks, torch.device("cpu"))
    return with_one_shot_sums(group, memory, store, "tp", rank, ["cpu"] * ranks) is group


def test_torch_without_such_memory_leaves_the_group_as_it_is() -> None:
    assert run(without_gpus, 2) == [True, True]
