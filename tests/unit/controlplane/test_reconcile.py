"""The rules of `controlplane.reconcile`, one by one."""

from __future__ import annotations

import pytest

from controlplane.reconcile import (
    BACK_OFF_CAP_S,
    DEGRADE_AFTER_S,
    RETURN_AFTER_S,
    SUSPECT_S,
    Form,
    Prune,
    Remove,
)
from phalanx.store.records import LayoutRecord, ShardState
from tests.unit.controlplane.world import World


@pytest.fixture
def world() -> World:
    return World()


def formed(world: World) -> list[str]:
    return [action.assignment.replica for action in world.settle().actions if isinstance(action, Form)]


def serve(
    world: World, name: str, replicas: int, tp: int = 1, pp: int = 1, fallbacks: tuple[LayoutRecord, ...] = ()
) -> None:
    """Apply a deployment and let its replicas become ready."""
    world.apply(name, replicas, tp, pp, fallbacks=fallbacks)
    world.settle()
    world.ready(*(f"{name}-{index}" for index in range(replicas)))
    world.settle()


def test_nothing_is_done_for_nothing(world: World) -> None:
    world.boot("w0")
    assert world.settle().actions == ()


def test_every_replica_is_formed_from_free_workers(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3", "w4")
    world.apply("a", 2, tp=2)
    assert formed(world) == ["a-0", "a-1"]
    assert world.members("a-0") + world.members("a-1") == ["w0", "w1", "w2", "w3"]


def test_the_epoch_is_the_assignments_mod_revision(world: World) -> None:
    world.boot("w0")
    world.apply("a")
    world.settle()
    entry = world.listing.entries[world.keys.assignment("a-0")]
    assert world.snapshot.replicas["a-0"].epoch == entry.mod_revision


def test_too_few_workers_leave_a_shortage_and_no_partial_replica(world: World) -> None:
    world.boot("w0")
    world.apply("a", tp=2, pp=2)
    assert world.settle().shortages == {"a-0": "needs 4 workers (tp=2 x pp=2), 1 is free"}
    assert world.snapshot.replicas == {}


def test_a_worker_that_joins_ends_the_shortage(world: World) -> None:
    world.boot("w0")
    world.apply("a", tp=2)
    world.settle()
    world.boot("w1")
    assert formed(world) == ["a-0"]


def test_each_deployment_gets_its_first_replica_before_anyones_second(world: World) -> None:
    world.boot("w0", "w1")
    world.apply("a", 2)
    world.apply("b", 2)
    assert formed(world) == ["a-0", "b-0"]


def test_a_draining_worker_gets_nothing(world: World) -> None:
    world.boot("w0", draining=True)
    world.apply("a")
    assert formed(world) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_shard_forms_the_replica_again_with_its_workers(world: World, rank: int) -> None:
    world.boot("w0", "w1", "w2")
    serve(world, "a", 1, tp=2)
    before = world.snapshot.replicas["a-0"].epoch
    world.fail("a-0", rank)
    assert formed(world) == ["a-0"]
    assert world.members("a-0") == ["w0", "w1"]
    assert world.snapshot.replicas["a-0"].epoch > before


def test_a_lost_worker_is_replaced_at_its_rank(world: World) -> None:
    world.boot("w0", "w1", "w2")
    serve(world, "a", 1, tp=2)
    world.die("w0")
    assert formed(world) == ["a-0"]
    assert world.members("a-0") == ["w2", "w1"]


def test_a_worker_that_booted_again_is_a_new_member(world: World) -> None:
    world.boot("w0", "w1")
    serve(world, "a", 1)
    world.boot("w0")
    assert formed(world) == ["a-0"]
    member = world.snapshot.replicas["a-0"].assignment.members[0]
    assert (member.worker, member.incarnation) == ("w0", world.snapshot.workers["w0"].incarnation)


def test_a_shard_of_an_earlier_epoch_says_nothing(world: World) -> None:
    world.boot("w0")
    serve(world, "a", 1)
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
            assert formed(world) == ["a-0"]
        waits.append(world.now - failed_at)
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    world.ready("a-0")
    world.settle()
    world.fail("a-0")
    assert formed(world) == ["a-0"]
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
    assert formed(world) == ["a-0"]
    assert world.snapshot.replicas["a-0"].assignment.failures == 0


def test_a_clock_that_was_set_back_does_not_hold_a_replica_up(world: World) -> None:
    world.boot("w0")
    world.apply("a")
    world.settle()
    world.now -= 1_000
    world.fail("a-0", permanent=True)
    assert formed(world) == ["a-0"]


def test_a_replica_that_lost_a_worker_is_left_until_the_worker_is_back(world: World) -> None:
    """Engines of the others go on if the lease alone was lost: nothing is removed early."""
    world.boot("w0", "w1")
    serve(world, "a", 1, tp=2)
    registration = world.snapshot.workers["w1"]
    world.die("w1")
    assert world.settle().actions == ()
    assert world.settle().shortages == {"a-0": "needs 2 workers (tp=2 x pp=1), 1 is free"}
    epoch = world.snapshot.replicas["a-0"].epoch
    world.put(world.keys.worker("w1"), registration)
    world.ready("a-0")
    assert world.settle().actions == ()
    assert world.snapshot.replicas["a-0"].epoch == epoch


def test_what_is_left_of_a_broken_replica_serves_another(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    serve(world, "a", 2, tp=2)
    world.die("w0")
    world.settle()
    world.die("w2")
    decision = world.settle()
    assert [type(action) for action in decision.actions[:2]] == [Remove, Form]
    assert list(world.snapshot.replicas) == ["a-0"]
    assert set(world.members("a-0")) == {"w1", "w3"}


def test_scaling_down_removes_the_highest_index_first(world: World) -> None:
    world.boot("w0", "w1", "w2")
    serve(world, "a", 3)
    world.apply("a", 1)
    removed = [action.replica for action in world.settle().actions if isinstance(action, Remove)]
    assert removed == ["a-2", "a-1"]
    assert list(world.snapshot.replicas) == ["a-0"]


def test_scaling_keeps_the_replicas_that_are_there(world: World) -> None:
    world.boot("w0", "w1", "w2")
    serve(world, "a", 1)
    before = world.snapshot.replicas["a-0"]
    world.apply("a", 3)
    assert formed(world) == ["a-1", "a-2"]
    assert world.snapshot.replicas["a-0"] == before


def test_deleting_a_deployment_removes_all_of_it(world: World) -> None:
    world.boot("w0", "w1")
    serve(world, "a", 1, tp=2)
    world.delete("a")
    world.settle()
    assert [key for key in world.listing.entries if "/replicas/" in key] == []


def test_a_shard_status_written_after_the_removal_is_deleted(world: World) -> None:
    world.boot("w0")
    serve(world, "a", 1)
    late = world.snapshot.shards["a-0", 0]
    world.delete("a")
    world.settle()
    world.put(world.keys.shard("a-0", 0), late)
    assert world.settle().actions == (Prune("a-0", 0),)


def test_workers_freed_by_a_removal_are_used_in_the_same_decision(world: World) -> None:
    world.boot("w0")
    serve(world, "a", 1)
    world.apply("b")
    world.settle()
    world.delete("a")
    assert formed(world) == ["b-0"]


def test_a_new_shape_rolls_one_replica_at_a_time(world: World) -> None:
    world.boot("w0", "w1", "w2")
    serve(world, "a", 3)
    world.apply("a", 3, model="/models/two")
    order = []
    for _ in range(3):
        (name,) = formed(world)
        assert formed(world) == []
        order.append(name)
        world.report(name, ShardState.STARTING)
        assert formed(world) == []
        world.ready(name)
    assert order == ["a-0", "a-1", "a-2"]
    world.settle()
    assert {replica.assignment.deployment.model for replica in world.snapshot.replicas.values()} == {
        "/models/two"
    }


def test_a_roll_stops_at_a_replica_that_fails(world: World) -> None:
    world.boot("w0", "w1")
    serve(world, "a", 2)
    world.apply("a", 2, model="/models/broken")
    assert formed(world) == ["a-0"]
    world.fail("a-0", permanent=True)
    assert formed(world) == []
    assert world.snapshot.replicas["a-1"].assignment.deployment.model == "/models/one"


def test_a_roll_that_cannot_be_placed_leaves_what_serves(world: World) -> None:
    world.boot("w0", "w1")
    serve(world, "a", 2)
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
    assert formed(world) == ["a-1"]


def test_a_smaller_shape_frees_workers_for_others_at_once(world: World) -> None:
    world.boot("w0", "w1")
    serve(world, "a", 1, tp=2)
    world.apply("b")
    world.settle()
    world.apply("a", 1, tp=1)
    assert formed(world) == ["a-0", "b-0"]


def test_a_decision_on_a_view_that_lags_behind_writes_nothing(world: World) -> None:
    """Else the second deployment would get the worker that the first was given just before."""
    world.boot("w0")
    world.apply("b")
    lagging = world.listing
    world.delete("b")
    world.apply("a")
    world.settle()
    decision, written = world.reconcile(lagging)
    assert [type(action) for action in decision.actions] == [Form]
    assert not written
    assert list(world.snapshot.replicas) == ["a-0"]


def test_a_large_cluster_is_written_in_several_transactions(world: World) -> None:
    world.boot(*(f"w{index}" for index in range(120)))
    world.apply("a", 120)
    assert len(formed(world)) == 120


FALLBACKS = (LayoutRecord(2, 1, 10 << 20), LayoutRecord(1, 2, 10 << 20), LayoutRecord(1, 1, 20 << 20))


def layout(world: World, replica: str = "a-0") -> tuple[int, int]:
    deployment = world.snapshot.replicas[replica].assignment.deployment
    return deployment.tp, deployment.pp


def degraded(world: World) -> None:
    """A replica of four that has lost a worker for good."""
    world.boot("w0", "w1", "w2", "w3")
    serve(world, "a", 1, tp=2, pp=2, fallbacks=FALLBACKS)
    world.die("w1")
    world.settle()
    world.now += DEGRADE_AFTER_S
    assert formed(world) == ["a-0"]


def test_a_replica_that_lacks_workers_for_long_runs_in_a_smaller_layout(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    serve(world, "a", 1, tp=2, pp=2)
    world.apply("a", 1, 2, 2, fallbacks=FALLBACKS)
    world.die("w1")
    decision = world.settle()
    assert decision.actions == ()
    assert decision.wake_at == world.now + DEGRADE_AFTER_S
    world.now += DEGRADE_AFTER_S / 2
    assert formed(world) == []
    world.now += DEGRADE_AFTER_S / 2
    assert formed(world) == ["a-0"]
    assert layout(world) == (2, 1)
    assert world.members("a-0")[0] == "w0", "what is left of it stays where it is"


def test_a_worker_that_comes_back_in_time_spares_the_smaller_layout(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    serve(world, "a", 1, tp=2, pp=2, fallbacks=FALLBACKS)
    world.die("w1")
    world.settle()
    world.now += DEGRADE_AFTER_S - 1
    world.boot("w1")
    assert formed(world) == ["a-0"]
    assert layout(world) == (2, 2)


def test_a_degraded_replica_returns_when_a_worker_joins_but_not_at_once(world: World) -> None:
    degraded(world)
    world.ready("a-0")
    world.boot("w9")
    world.settle()
    decision = world.settle()
    assert not [action for action in decision.actions if isinstance(action, Form)]
    assert decision.wake_at == world.now + RETURN_AFTER_S
    world.now += RETURN_AFTER_S
    assert formed(world) == ["a-0"]
    assert layout(world) == (2, 2)
    assert sorted(world.members("a-0")) == ["w0", "w2", "w3", "w9"]


def test_a_degraded_replica_that_is_not_ready_yet_returns_at_once(world: World) -> None:
    degraded(world)
    world.boot("w9")
    assert formed(world) == ["a-0"]
    assert layout(world) == (2, 2)


def test_a_degraded_replica_loses_more_and_regains_some(world: World) -> None:
    degraded(world)
    world.ready("a-0")
    world.settle()
    for gone in ("w2", "w3"):
        world.die(gone)
    world.settle()
    world.now += DEGRADE_AFTER_S
    assert formed(world) == ["a-0"]
    assert (layout(world), world.members("a-0")) == ((1, 1), ["w0"])
    world.ready("a-0")
    world.settle()
    world.now += RETURN_AFTER_S
    world.boot("w5")
    assert formed(world) == ["a-0"]
    assert layout(world) == (2, 1)


def test_a_replica_that_has_never_served_waits_for_its_workers(world: World) -> None:
    world.boot("w0", "w1", "w2")
    world.apply("a", 1, 2, 2, fallbacks=FALLBACKS)
    assert formed(world) == []
    world.now += 10 * DEGRADE_AFTER_S
    assert formed(world) == []


def test_a_layout_that_does_not_fit_into_memory_is_passed_over(world: World) -> None:
    world.boot("w0", "w1", memory_bytes=2 << 30)
    serve(world, "a", 1, tp=2, fallbacks=(LayoutRecord(1, 1, 1 << 30),))
    world.die("w1")
    world.settle()
    world.now += DEGRADE_AFTER_S
    assert formed(world) == []


def test_a_smaller_layout_that_fails_is_tried_again_later_and_later(world: World) -> None:
    degraded(world)
    for failures in range(1, 4):
        world.fail("a-0")
        decision = world.settle()
        if decision.wake_at is not None:
            world.now = decision.wake_at
            world.settle()
        world.now += DEGRADE_AFTER_S
        world.settle()
        assert world.snapshot.replicas["a-0"].assignment.failures == failures
        assert layout(world) == (2, 1)


def test_another_replica_is_whole_before_this_one_is_degraded(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    serve(world, "a", 2, tp=2, fallbacks=(LayoutRecord(1, 1),))
    world.die("w0")
    world.die("w2")
    assert formed(world) == ["a-0"]
    assert layout(world) == (2, 1)
    assert "a-1" not in world.snapshot.replicas


def test_of_several_degraded_replicas_one_at_a_time_returns(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    serve(world, "a", 2, tp=2, fallbacks=(LayoutRecord(1, 1),))
    for gone, name in (("w0", "a-0"), ("w2", "a-1")):
        world.die(gone)
        world.settle()
        world.now += DEGRADE_AFTER_S
        assert formed(world) == [name]
        assert layout(world, name) == (1, 1)
        world.ready(name)
        world.settle()
    world.now += RETURN_AFTER_S
    world.boot("w4", "w5")
    for name in ("a-0", "a-1"):
        assert formed(world) == [name]
        assert layout(world, name) == (2, 1)
        world.ready(name)


def test_when_most_workers_go_at_once_the_store_is_suspected_and_they_may_come_back(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    serve(world, "a", 2, tp=2)
    world.boot("spare0", "spare1")
    known = dict(world.snapshot.workers)
    epochs = {name: assigned.epoch for name, assigned in world.snapshot.replicas.items()}
    for name in ("w0", "w1", "w2", "w3"):
        world.die(name)
    decision = world.settle()
    assert decision.actions == ()
    assert decision.wake_at == world.now + SUSPECT_S
    for name in ("w0", "w1", "w2"):
        world.now += SUSPECT_S / 4
        world.put(world.keys.worker(name), known[name])
        assert not formed(world), "the last one is late"
    world.put(world.keys.worker("w3"), known["w3"])
    world.ready("a-0", "a-1")
    assert not formed(world)
    assert {name: assigned.epoch for name, assigned in world.snapshot.replicas.items()} == epochs


def test_workers_that_do_not_come_back_are_replaced_after_all(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    serve(world, "a", 2, tp=2)
    world.boot("spare0", "spare1")
    for name in ("w0", "w1", "w2"):
        world.die(name)
    assert not formed(world)
    world.now += SUSPECT_S
    assert formed(world) == ["a-0"]
    assert set(world.members("a-0")) <= {"spare0", "spare1", "w3"}


def test_a_worker_that_booted_again_has_died_whatever_became_of_the_others(world: World) -> None:
    world.boot("w0", "w1")
    serve(world, "a", 1, tp=2)
    world.die("w1")
    world.boot("w0", "w1")
    assert formed(world) == ["a-0"]


def test_a_hysteresis_counts_from_when_the_smaller_layout_was_ready(world: World) -> None:
    degraded(world)
    world.now += 5 * RETURN_AFTER_S  # it took that long to load
    world.ready("a-0")
    world.settle()
    world.boot("w9")
    assert formed(world) == []
    world.now += RETURN_AFTER_S
    assert formed(world) == ["a-0"]


def test_a_replica_does_not_grow_with_the_workers_that_another_could_be_degraded_to(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    serve(world, "a", 2, tp=2, fallbacks=(LayoutRecord(1, 1),))
    world.die("w1")
    world.settle()
    world.now += DEGRADE_AFTER_S
    assert formed(world) == ["a-0"]
    world.ready("a-0")
    world.settle()
    world.now += 2 * RETURN_AFTER_S
    world.die("w3")
    assert formed(world) == []
    world.now += DEGRADE_AFTER_S
    assert formed(world) == ["a-1"]
    assert (layout(world, "a-0"), layout(world, "a-1")) == ((1, 1), (1, 1))


def test_a_replica_whose_workers_were_taken_is_degraded_when_one_joins(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    serve(world, "a", 2, tp=2, fallbacks=(LayoutRecord(1, 1),))
    world.die("w0")
    world.settle()
    world.die("w2")
    assert formed(world) == ["a-0"]
    assert "a-1" not in world.snapshot.replicas
    world.ready("a-0")
    world.boot("w9")
    world.settle()
    world.now += DEGRADE_AFTER_S
    assert formed(world) == ["a-1"]
    assert layout(world, "a-1") == (1, 1)


def test_that_a_replica_had_served_is_forgotten_with_its_deployment(world: World) -> None:
    world.boot("w0", "w1")
    serve(world, "a", 1, tp=2, fallbacks=(LayoutRecord(1, 1),))
    world.delete("a")
    world.settle()
    assert not world.snapshot.ready
    world.die("w0")
    world.apply("a", 1, 2, 1, fallbacks=(LayoutRecord(1, 1),))
    assert formed(world) == []
    world.now += 2 * DEGRADE_AFTER_S
    assert formed(world) == []


def test_a_smaller_layout_that_failed_does_not_hold_up_the_one_that_is_wanted(world: World) -> None:
    degraded(world)
    world.fail("a-0", permanent=True)
    assert formed(world) == []
    world.boot("w1")
    assert formed(world) == ["a-0"]
    assert layout(world) == (2, 2)


def test_a_degraded_replica_is_formed_again_as_it_was_at_once(world: World) -> None:
    degraded(world)
    world.ready("a-0")
    world.settle()
    world.fail("a-0")
    assert formed(world) == ["a-0"]
    assert layout(world) == (2, 1)


def test_workers_that_have_long_been_missing_make_no_crowd(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    serve(world, "a", 1, tp=3)
    serve(world, "b", 1)
    world.die("w0")
    world.die("w1")
    world.settle()
    world.now += 100
    world.settle()
    world.boot("spare")
    world.die(*world.members("b-0"))
    assert formed(world) == ["b-0"]
