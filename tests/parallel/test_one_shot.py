"""Small sums in one kernel, on CPUs: memory that ranks share stands in for that of GPUs."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch.distributed import Store

from engine.distributed import shm
from engine.distributed.one_shot import OneShotRow, Peers, SymmetricMemory, one_shot
from engine.distributed.parallel import Row
from engine.errors import EngineError
from tests.parallel.processes import run

TIMEOUT = timedelta(seconds=30)
MOST = {2: 1 << 20, 4: 512 << 10}


class Memory:
    """Sums by way of another row, as the kernel would; `fault` is what is wrong with this rank."""

    def __init__(self, store: Store, rank: int, ranks: int, fault: str) -> None:
        row = shm.share_row(store, "stand-in", rank, ranks, TIMEOUT)
        assert row is not None
        self._row, self._fault = row, fault
        self.sums: list[int] = []

    def reach(self, peers: Peers) -> bool:
        return self._fault != "reach"

    def allocate(self, size: int) -> torch.Tensor:
        if self._fault == "allocate":
            raise TypeError("empty_strided_p2p(): incompatible function arguments")
        return torch.zeros(size, dtype=torch.uint8)

    def meet(self, shared: torch.Tensor) -> None:
        if self._fault == "meet":
            raise RuntimeError("CUDA driver error: peer access is not supported")

    def sum(self, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert shared.shape == x.shape
        assert shared.dtype is x.dtype
        self.sums.append(x.nbytes)
        shared.copy_(x)
        return self._row.all_reduce(shared.clone()) + (self._fault == "sum")


def rows(store: Store, rank: int, ranks: int, fault: str = "") -> tuple[Row, Row, Memory]:
    """A row as it is, with small sums done quickly if they can be, and what does these."""
    row = shm.share_row(store, "row", rank, ranks, TIMEOUT)
    assert row is not None
    memory = Memory(store, rank, ranks, fault)
    peers = [f"GPU-{other}" for other in range(ranks)]
    return row, one_shot(row, memory, store, "row", rank, peers), memory


def add(rank: int, ranks: int, store: Store) -> list[int]:
    """Sums of many sizes and types; returns the bytes of those that took the quick way."""
    _, quick, memory = rows(store, rank, ranks)
    tried = len(memory.sums)
    largest = MOST[ranks]
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for rows_of_it in (1, 3, largest // (64 * dtype.itemsize), largest // (64 * dtype.itemsize) + 1):
            x = torch.full((rows_of_it, 64), rank + 1, dtype=dtype)
            total = quick.all_reduce(x)
            assert total.shape == x.shape
            assert total.dtype is dtype
            assert bool((total == sum(range(1, ranks + 1))).all())
    part = torch.ones(200)[4:]  # would not be aligned as the memory is
    assert bool((quick.all_reduce(part) == ranks).all())
    assert (
        quick.gather_columns(torch.full((2, 3), rank)).tolist()
        == [[other for other in range(ranks) for _ in range(3)]] * 2
    )
    return memory.sums[tried:]


@pytest.mark.parametrize("ranks", [2, 4])
def test_small_sums_take_the_quick_way_and_all_are_right(ranks: int) -> None:
    most = MOST[ranks]
    assert run(add, ranks) == [[128, 384, most, 256, 768, most]] * ranks


def with_a_fault(rank: int, ranks: int, store: Store, fault: str, faulty: int) -> bool:
    row, chosen, _ = rows(store, rank, ranks, fault if rank == faulty else "")
    assert bool((chosen.all_reduce(torch.ones(100)) == ranks).all())
    return chosen is row


@pytest.mark.parametrize("fault", ["reach", "allocate", "sum"])
@pytest.mark.parametrize("faulty", [0, 1])
def test_if_one_rank_is_not_able_none_takes_it(fault: str, faulty: int) -> None:
    assert run(with_a_fault, 2, fault, faulty) == [True, True]


def failing_to_meet(rank: int, ranks: int, store: Store) -> str:
    with pytest.raises(EngineError, match="PHALANX_ONE_SHOT=0") as failed:
        rows(store, rank, ranks, "meet")
    return failed.value.reason


def test_a_rank_that_fails_where_others_wait_for_it_ends_and_says_what_to_do() -> None:
    assert run(failing_to_meet, 2) == ["INTERNAL"] * 2


def as_many_ranks(rank: int, ranks: int, store: Store) -> bool:
    return isinstance(rows(store, rank, ranks)[1], OneShotRow)


def test_a_number_of_ranks_that_the_kernel_does_not_know_goes_on_as_before() -> None:
    assert run(as_many_ranks, 3) == [False] * 3


def switched_off_at_rank_1(rank: int, ranks: int, store: Store) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHALANX_ONE_SHOT", "01"[rank == 0])
        return isinstance(rows(store, rank, ranks)[1], OneShotRow)


def test_it_can_be_switched_off() -> None:
    assert run(switched_off_at_rank_1, 2) == [False, False]


class OfCpus(SymmetricMemory):
    """Torch's, which reaches GPUs alone: on a CPU it fails where it is asked for memory."""

    def reach(self, peers: Peers) -> bool:
        return True


def without_gpus(rank: int, ranks: int, store: Store) -> bool:
    row = shm.share_row(store, "row", rank, ranks, TIMEOUT)
    assert row is not None
    memory = OfCpus(store, "row", rank, ranks, torch.device("cpu"))
    return one_shot(row, memory, store, "row", rank, ["cpu"] * ranks) is row


def test_torch_without_such_memory_leaves_the_row_as_it_is() -> None:
    assert run(without_gpus, 2) == [True, True]
