"""Groups over shared memory, with every rank a process of its own."""

from __future__ import annotations

import os
import random
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import Store

from engine.distributed import shared_memory
from engine.distributed.rendezvous import connect
from engine.distributed.shared_memory_groups import open_stage_link, open_tensor_parallel
from engine.errors import EngineError
from engine.grid import Grid
from tests.parallel.processes import run, start

TIMEOUT = timedelta(seconds=60)
SLOT = 32768  # floats in a slot
SIZES = (1, 3, 17, 576, 4096, SLOT - 1, SLOT, SLOT + 1, 3 * SLOT + 5)
CPU = torch.device("cpu")
OBSTACLES = {
    "not made": (os, "memfd_create"),
    "not seen": (shared_memory, "_map"),
    "not built": (shared_memory, "_library"),
}


def part(rank: int, size: int, number: int = 0) -> torch.Tensor:
    """A rank's part of a sum, of many magnitudes: another order of additions gives other bits."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randn(size, generator=generator) * 10 ** (4 * torch.rand(size, generator=generator))


def sum_in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for other in parts[1:]:
        total += other
    return total


def arrive_at_random(rank: int, number: int) -> None:
    """Arrive early or late, sometimes so late that the other ranks already sleep on the futex."""
    end = time.monotonic() + random.Random(97 * number + rank).choice((0, 0, 1e-5, 1e-4, 1e-3))
    while time.monotonic() < end:
        pass


def add(rank: int, ranks: int, store: Store) -> int:
    group = open_tensor_parallel(store, "tp", rank, ranks, TIMEOUT)
    assert group is not None
    wrong = 0
    for number, size in enumerate(SIZES * 3):
        arrive_at_random(rank, number)
        expected = sum_in_order([part(other, size, number) for other in range(ranks)])
        wrong += not torch.equal(group.all_reduce(part(rank, size, number)), expected)
    return wrong


@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_are_those_in_the_order_of_ranks_bit_for_bit(ranks: int) -> None:
    assert run(add, ranks) == [0] * ranks


def add_bfloat16(rank: int, ranks: int, store: Store) -> bool:
    group = open_tensor_parallel(store, "tp", rank, ranks, TIMEOUT)
    assert group is not None
    parts = [part(other, 1000).bfloat16() for other in range(ranks)]
    expected = sum_in_order([each.float() for each in parts]).bfloat16()
    return torch.equal(group.all_reduce(parts[rank]), expected)


def test_sums_in_bfloat16_are_rounded_once() -> None:
    assert run(add_bfloat16, 3) == [True] * 3


def gather(rank: int, ranks: int, store: Store) -> bool:
    group = open_tensor_parallel(store, "tp", rank, ranks, TIMEOUT)
    assert group is not None
    right = True
    for number, (rows, columns) in enumerate([(1, 1), (5, 7), (3, SLOT + 3), (40, 1000), (1, 4 * SLOT)]):
        arrive_at_random(rank, number)
        parts = [part(other, rows * columns, number).view(rows, columns) for other in range(ranks)]
        right &= torch.equal(group.gather_columns(parts[rank]), torch.cat(parts, dim=1))
    return right


@pytest.mark.parametrize("ranks", [2, 4])
def test_columns_come_side_by_side(ranks: int) -> None:
    assert run(gather, ranks) == [True] * ranks


def pass_on(rank: int, ranks: int, store: Store) -> bool:
    link = open_stage_link(store, "link", rank, 4 * max(SIZES), 3, TIMEOUT)
    assert link is not None
    right = True
    for number, size in enumerate(SIZES * 4):
        arrive_at_random(rank, number)
        if rank == 0:
            link.send(part(0, size, number))
        else:
            right &= torch.equal(link.receive((size,), torch.float32), part(0, size, number))
    return right


def test_messages_arrive_whole_and_in_order() -> None:
    assert run(pass_on, 2) == [True] * 2


def send_ahead(rank: int, ranks: int, store: Store) -> bool:
    link = open_stage_link(store, "link", rank, 64, 2, TIMEOUT)
    assert link is not None
    if rank == 0:
        for number in range(2):
            link.send(torch.tensor([number]))
        store.set("sent", "2")
        return True
    store.get("sent")
    return [link.receive((1,), torch.int64).item() for _ in range(2)] == [0, 1]


def test_as_many_messages_as_may_be_in_flight_are_sent_before_any_is_received() -> None:
    assert run(send_ahead, 2) == [True] * 2


def survive(rank: int, ranks: int, store: Store) -> str:
    group = open_tensor_parallel(store, "tp", rank, ranks, TIMEOUT)
    assert group is not None
    group.all_reduce(part(rank, 10))
    store.set(f"summed/{rank}", "")
    if rank == 1:
        for other in range(ranks):
            store.get(f"summed/{other}")
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(EngineError) as caught:
        group.all_reduce(part(rank, 10))
    return caught.value.reason


def test_whoever_waits_for_a_rank_that_was_killed_sees_it() -> None:
    store, processes, connections = start(survive, 3)
    assert [connections[rank].recv() for rank in (0, 2)] == [(None, "RANK_LOST")] * 2
    for process in processes:
        process.join()
    del store


def outlive(rank: int, ranks: int, store: Store) -> str:
    group = open_tensor_parallel(store, "tp", rank, ranks, TIMEOUT)
    assert group is not None
    if rank == 1:
        group.leave()
        store.get("seen")  # stay alive until rank 0 has noticed the call of `leave`
        return ""
    with pytest.raises(EngineError) as caught:
        group.all_reduce(part(rank, 10))
    store.set("seen", "")
    return caught.value.reason


def test_whoever_waits_for_a_rank_that_leaves_need_not_wait_for_its_end() -> None:
    assert run(outlive, 2) == ["RANK_LOST", ""]


def wait_in_vain(rank: int, ranks: int, store: Store) -> str:
    group = open_tensor_parallel(store, "tp", rank, ranks, timedelta(seconds=0))
    assert group is not None
    if rank == 1:
        store.get("over")
        return ""
    with pytest.raises(EngineError) as caught:
        group.all_reduce(part(rank, 10))
    store.set("over", "")
    return caught.value.message


def test_whoever_waits_for_too_long_says_so() -> None:
    assert run(wait_in_vain, 2) == ["another rank of the replica has not come in 0 s", ""]


def sum_for_ever(rank: int, ranks: int, store: Store) -> None:
    group = open_tensor_parallel(store, "tp", rank, ranks, TIMEOUT)
    assert group is not None
    while True:
        group.all_reduce(part(rank, 10))
        store.set(f"summing/{rank}", "")


def test_nothing_is_left_of_the_memory_when_all_ranks_are_killed() -> None:
    store, processes, _ = start(sum_for_ever, 2)
    for rank in range(2):
        store.get(f"summing/{rank}")
    maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in processes)
    lines = [line.split() for line in maps.splitlines()]
    shared = {" ".join(line[5:]) for line in lines if line[1].endswith("s")}
    for process in processes:
        process.kill()
        process.join()
    assert any("phalanx" in path for path in shared)
    assert not any(Path(path).exists() for path in shared if path.startswith("/") and "phalanx" in path)


def refuse(*arguments: Any) -> Any:
    raise PermissionError("not here")


def do_without(rank: int, ranks: int, store: Store, obstacle: str, culprit: int) -> tuple[str, bool, float]:
    if rank == culprit:
        setattr(*OBSTACLES[obstacle], refuse)
    torch.set_num_threads(1)
    group = connect(Grid(2, 2, rank), store, "127.0.0.1", CPU, 400)
    ours = Grid(2, 2, rank).pp_rank * 2
    total = group.all_reduce(part(rank, 100))
    right = torch.equal(total, sum_in_order([part(ours, 100), part(ours + 1, 100)]))
    if rank < 2:
        group.send_hidden(total.view(1, 100))
        passed = float(total.sum())
    else:
        passed = float(group.recv_hidden((1, 100), torch.float32, CPU).sum())
    for other in range(ranks):  # gloo's connections break when a process ends
        store.set(f"over/{rank}", "")
        store.get(f"over/{other}")
    return type(group._tensor_parallel).__name__, right, passed


@pytest.mark.parametrize(("obstacle", "culprit"), [("not made", 0), ("not seen", 1), ("not built", 1)])
def test_a_group_that_cannot_share_memory_goes_over_gloo(obstacle: str, culprit: int) -> None:
    over_gloo, shared = "ProcessGroupTensorParallel", "SharedTensorParallel"
    results = run(do_without, 4, obstacle, culprit)
    assert [result[0] for result in results] == [over_gloo, over_gloo, shared, shared]
    assert all(right for _, right, _ in results)
    assert [results[0][2], results[1][2]] == [results[2][2], results[3][2]]
