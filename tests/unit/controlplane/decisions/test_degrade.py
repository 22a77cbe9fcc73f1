"""When a replica runs in a smaller layout."""

from __future__ import annotations

from controlplane.decisions.degrade import DEGRADE_AFTER_S
from controlplane.decisions.lost_workers import SUSPECT_S
from controlplane.decisions.reshape import GROW_AFTER_S
from phalanx.store.records import LayoutRecord
from tests.unit.controlplane.world import FALLBACKS, World


def test_a_replica_that_lacks_workers_for_long_runs_in_a_smaller_layout(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    world.serve("a", 1, tp=2, pp=2)
    world.apply("a", 1, 2, 2, fallbacks=FALLBACKS)
    world.die("w1")
    decision = world.settle()
    assert decision.actions == ()
    assert decision.wake_at == world.now + DEGRADE_AFTER_S
    world.now += DEGRADE_AFTER_S / 2
    assert world.formed() == []
    world.now += DEGRADE_AFTER_S / 2
    assert world.formed() == ["a-0"]
    assert world.layout() == (2, 1)
    assert world.members("a-0")[0] == "w0", "what is left of it stays where it is"


def test_a_worker_that_comes_back_in_time_spares_the_smaller_layout(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    world.serve("a", 1, tp=2, pp=2, fallbacks=FALLBACKS)
    world.die("w1")
    world.settle()
    world.now += DEGRADE_AFTER_S - 1
    world.boot("w1")
    assert world.formed() == ["a-0"]
    assert world.layout() == (2, 2)


def test_a_degraded_replica_loses_more_and_regains_some(world: World) -> None:
    world.degrade()
    world.ready("a-0")
    world.settle()
    for gone in ("w2", "w3"):
        world.die(gone)
    world.settle()
    world.now += DEGRADE_AFTER_S
    assert world.formed() == ["a-0"]
    assert (world.layout(), world.members("a-0")) == ((1, 1), ["w0"])
    world.ready("a-0")
    world.settle()
    world.now += GROW_AFTER_S
    world.boot("w5")
    assert world.formed() == ["a-0"]
    assert world.layout() == (2, 1)


def test_a_replica_that_has_never_served_waits_for_its_workers(world: World) -> None:
    world.boot("w0", "w1", "w2")
    world.apply("a", 1, 2, 2, fallbacks=FALLBACKS)
    assert world.formed() == []
    world.now += 10 * DEGRADE_AFTER_S
    assert world.formed() == []


def test_a_layout_that_does_not_fit_into_memory_is_passed_over(world: World) -> None:
    world.boot("w0", "w1", memory_bytes=2 << 30)
    world.serve("a", 1, tp=2, fallbacks=(LayoutRecord(1, 1, 1 << 30),))
    world.die("w1")
    world.settle()
    world.now += DEGRADE_AFTER_S
    assert world.formed() == []


def test_a_smaller_layout_that_fails_is_tried_again_later_and_later(world: World) -> None:
    world.degrade()
    for failures in range(1, 4):
        world.fail("a-0")
        decision = world.settle()
        if decision.wake_at is not None:
            world.now = decision.wake_at
            world.settle()
        world.now += DEGRADE_AFTER_S
        world.settle()
        assert world.snapshot.replicas["a-0"].assignment.failures == failures
        assert world.layout() == (2, 1)


def test_another_replica_is_whole_before_this_one_is_degraded(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    world.serve("a", 2, tp=2, fallbacks=(LayoutRecord(1, 1),))
    world.die("w0")
    world.die("w2")
    assert world.formed() == ["a-0"]
    assert world.layout() == (2, 1)
    assert "a-1" not in world.snapshot.replicas


def test_a_replica_whose_workers_were_taken_is_degraded_when_one_joins(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    world.serve("a", 2, tp=2, fallbacks=(LayoutRecord(1, 1),))
    world.die("w0")
    world.settle()
    world.die("w2")
    assert world.formed() == ["a-0"]
    assert "a-1" not in world.snapshot.replicas
    world.ready("a-0")
    world.boot("w9")
    world.settle()
    world.now += DEGRADE_AFTER_S
    assert world.formed() == ["a-1"]
    assert world.layout("a-1") == (1, 1)


def test_a_degraded_replica_is_formed_again_as_it_was_at_once(world: World) -> None:
    world.degrade()
    world.ready("a-0")
    world.settle()
    world.fail("a-0")
    assert world.formed() == ["a-0"]
    assert world.layout() == (2, 1)


def test_a_wait_for_lost_leases_does_not_restart_the_time_without_workers(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    world.serve("a", 1, tp=2, fallbacks=(LayoutRecord(1, 1),))
    world.serve("b", 2)
    world.die("w1")
    world.settle()
    world.now += DEGRADE_AFTER_S - 1
    known = dict(world.snapshot.workers)
    for name in known:
        world.die(name)
    assert "a-0" in world.settle().retries, "most workers vanished: the store may have lost their leases"
    for name, record in known.items():
        world.put(world.keys.worker(name), record)
    world.settle()
    world.now += SUSPECT_S
    assert world.formed() == ["a-0"]
    assert world.layout() == (1, 1)
