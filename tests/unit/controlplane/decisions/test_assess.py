"""When a failed replica is formed again."""

from __future__ import annotations

import pytest

from controlplane.decisions.assess import BACK_OFF_CAP_S
from tests.unit.controlplane.world import World


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_shard_forms_the_replica_again_with_its_workers(world: World, rank: int) -> None:
    world.boot("w0", "w1", "w2")
    world.serve("a", 1, tp=2)
    before = world.snapshot.replicas["a-0"].epoch
    world.fail("a-0", rank)
    assert world.formed() == ["a-0"]
    assert world.members("a-0") == ["w0", "w1"]
    assert world.snapshot.replicas["a-0"].epoch > before


def test_a_shard_of_an_earlier_epoch_says_nothing(world: World) -> None:
    world.boot("w0")
    world.serve("a", 1)
    world.fail("a-0")
    world.settle()
    world.now += 1
    assert world.settle().actions == ()


def test_failures_before_ready_wait_longer_each_time_and_ready_ends_that(world: World) -> None:
    world.boot("w0")
    world.apply("a")
    world.settle()
    waits = []
    for _ in range(9):
        world.fail("a-0")
        failed_at = world.now
        decision = world.settle()
        if decision.wake_at is not None:
            assert decision.actions == ()
            world.now = decision.wake_at
            assert world.formed() == ["a-0"]
        waits.append(world.now - failed_at)
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    world.ready("a-0")
    world.settle()
    world.fail("a-0")
    assert world.formed() == ["a-0"]
    assert world.snapshot.replicas["a-0"].assignment.failures == 0


def test_a_permanent_failure_waits_the_longest_at_once(world: World) -> None:
    world.boot("w0")
    world.apply("a")
    world.settle()
    world.fail("a-0", reason="no weights", permanent=True)
    assert world.settle().wake_at == world.now + BACK_OFF_CAP_S


def test_a_new_shape_is_tried_at_once_after_a_permanent_failure(world: World) -> None:
    world.boot("w0")
    world.apply("a")
    world.settle()
    world.fail("a-0", permanent=True)
    world.settle()
    world.apply("a", model="/models/two")
    assert world.formed() == ["a-0"]
    assert world.snapshot.replicas["a-0"].assignment.failures == 0


def test_a_clock_that_was_set_back_does_not_hold_a_replica_up(world: World) -> None:
    world.boot("w0")
    world.apply("a")
    world.settle()
    world.now -= 1_000
    world.fail("a-0", permanent=True)
    assert world.formed() == ["a-0"]


def test_a_smaller_layout_that_failed_does_not_hold_up_the_one_that_is_wanted(world: World) -> None:
    world.degrade()
    world.fail("a-0", permanent=True)
    assert world.formed() == []
    world.boot("w1")
    assert world.formed() == ["a-0"]
    assert world.layout() == (2, 2)
