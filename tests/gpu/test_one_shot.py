"""One-shot sums over two real GPUs; `tests/parallel/test_one_shot.py` tests the parts that need no GPU."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import Store

from engine.distributed.one_shot import OneShotTensorParallel
from engine.distributed.process_groups import ProcessGroupTensorParallel
from engine.distributed.rendezvous import connect
from engine.execution.cuda_graphs import CudaGraphCapture
from engine.grid import Grid
from tests.parallel.processes import run

RANKS = 2
REPEATS = 200
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")


def parts(size: int, number: int, device: torch.device) -> list[torch.Tensor]:
    """Every rank's numbers."""
    random = torch.Generator().manual_seed(number)
    return [torch.randn(size, 64, generator=random).bfloat16().to(device) for _ in range(RANKS)]


def add(rank: int, ranks: int, store: Store) -> str:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    parallel = connect(Grid(ranks, 1, rank), store, "127.0.0.1", device, 1 << 20)
    assert parallel.capturable
    for number, size in enumerate((1, 7, 256, 8192, 8193)):
        each = parts(size, number, device)
        assert torch.equal(parallel.all_reduce(each[rank].clone()), each[0] + each[1])

    x = torch.zeros(16, 64, dtype=torch.bfloat16, device=device)

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        total = parallel.all_reduce(x)
        return total, parallel.all_reduce(total * 2)

    repeat, (once, twice) = CudaGraphCapture()(work)
    for number in range(REPEATS):
        each = parts(16, number, device)
        x.copy_(each[rank])
        repeat()
        assert torch.equal(once, each[0] + each[1]), number
        assert torch.equal(twice, 4 * once), number
    return type(parallel._tensor_parallel).__name__


def test_sums_are_exact_directly_and_in_every_replay_of_a_cuda_graph() -> None:
    reachable = torch.cuda.can_device_access_peer(0, 1)
    used = OneShotTensorParallel if reachable else ProcessGroupTensorParallel
    assert run(add, RANKS) == [used.__name__] * RANKS
