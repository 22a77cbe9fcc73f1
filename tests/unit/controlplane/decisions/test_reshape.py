"""When a replica changes its shape, and when a degraded one grows."""

from __future__ import annotations

from dataclasses import replace

from controlplane.decisions.actions import FormReplica
from controlplane.decisions.degrade import DEGRADE_AFTER_S
from controlplane.decisions.reshape import GROW_AFTER_S
from phalanx.store.records import LayoutRecord, ShardState
from tests.unit.controlplane.world import World


def test_a_new_shape_rolls_one_replica_at_a_time(world: World) -> None:
    world.boot("w0", "w1", "w2")
    world.serve("a", 3)
    world.apply("a", 3, model="/models/two")
    order = []
    for _ in range(3):
        (name,) = world.formed()
        assert world.formed() == []
        order.append(name)
        world.report(name, ShardState.STARTING)
        assert world.formed() == []
        world.ready(name)
    assert order == ["a-0", "a-1", "a-2"]
    world.settle()
    assert {replica.assignment.deployment.model for replica in world.snapshot.replicas.values()} == {
        "/models/two"
    }


def test_a_roll_stops_at_a_replica_that_fails(world: World) -> None:
    world.boot("w0", "w1")
    world.serve("a", 2)
    world.apply("a", 2, model="/models/broken")
    assert world.formed() == ["a-0"]
    world.fail("a-0", permanent=True)
    assert world.formed() == []
    assert world.snapshot.replicas["a-1"].assignment.deployment.model == "/models/one"


def test_a_roll_that_cannot_be_placed_leaves_what_serves(world: World) -> None:
    world.boot("w0", "w1")
    world.serve("a", 2)
    world.apply("a", 2, tp=2)
    decision = world.settle()
    assert decision.actions == ()
    assert decision.shortages["a-0"] == "needs 2 workers (tp=2 x pp=1), 1 is free"


def test_a_replica_that_does_not_serve_takes_the_new_shape_at_once(world: World) -> None:
    world.boot("w0", "w1")
    world.apply("a", 2)
    world.settle()
    world.ready("a-0")
    world.settle()
    world.apply("a", 2, model="/models/two")
    assert world.formed() == ["a-1"]


def test_a_smaller_shape_frees_workers_for_others_at_once(world: World) -> None:
    world.boot("w0", "w1")
    world.serve("a", 1, tp=2)
    world.apply("b")
    world.settle()
    world.apply("a", 1, tp=1)
    assert world.formed() == ["a-0", "b-0"]


def test_a_degraded_replica_returns_when_a_worker_joins_but_not_at_once(world: World) -> None:
    world.degrade()
    world.ready("a-0")
    world.boot("w9")
    world.settle()
    decision = world.settle()
    assert not [action for action in decision.actions if isinstance(action, FormReplica)]
    assert decision.wake_at == world.now + GROW_AFTER_S
    world.now += GROW_AFTER_S
    assert world.formed() == ["a-0"]
    assert world.layout() == (2, 2)
    assert sorted(world.members("a-0")) == ["w0", "w2", "w3", "w9"]


def test_a_degraded_replica_that_is_not_ready_yet_returns_at_once(world: World) -> None:
    world.degrade()
    world.boot("w9")
    assert world.formed() == ["a-0"]
    assert world.layout() == (2, 2)


def test_of_several_degraded_replicas_one_at_a_time_returns(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    world.serve("a", 2, tp=2, fallbacks=(LayoutRecord(1, 1),))
    for gone, name in (("w0", "a-0"), ("w2", "a-1")):
        world.die(gone)
        world.settle()
        world.now += DEGRADE_AFTER_S
        assert world.formed() == [name]
        assert world.layout(name) == (1, 1)
        world.ready(name)
        world.settle()
    world.now += GROW_AFTER_S
    world.boot("w4", "w5")
    for name in ("a-0", "a-1"):
        assert world.formed() == [name]
        assert world.layout(name) == (2, 1)
        world.ready(name)


def test_a_hysteresis_counts_from_when_the_smaller_layout_was_ready(world: World) -> None:
    world.degrade()
    world.now += 5 * GROW_AFTER_S  # it took that long to load
    world.ready("a-0")
    world.settle()
    world.boot("w9")
    assert world.formed() == []
    world.now += GROW_AFTER_S
    assert world.formed() == ["a-0"]


def test_a_replica_does_not_grow_with_the_workers_that_another_could_be_degraded_to(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    world.serve("a", 2, tp=2, fallbacks=(LayoutRecord(1, 1),))
    world.die("w1")
    world.settle()
    world.now += DEGRADE_AFTER_S
    assert world.formed() == ["a-0"]
    world.ready("a-0")
    world.settle()
    world.now += 2 * GROW_AFTER_S
    world.die("w3")
    assert world.formed() == []
    world.now += DEGRADE_AFTER_S
    assert world.formed() == ["a-1"]
    assert (world.layout("a-0"), world.layout("a-1")) == ((1, 1), (1, 1))


def test_an_old_replica_that_forms_does_not_hold_up_one_that_can_be_reshaped(world: World) -> None:
    world.boot("w0", "w1")
    world.apply("a", 2)
    world.settle()
    world.ready("a-0")
    world.settle()
    draining = replace(world.snapshot.workers["w1"], draining=True)
    world.put(world.keys.worker("w1"), draining)
    world.boot("w2")
    world.apply("a", 2, tp=2)
    assert world.formed() == ["a-0"]
    assert world.members("a-0") == ["w0", "w2"]
