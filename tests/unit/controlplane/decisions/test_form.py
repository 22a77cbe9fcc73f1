"""When a replica gets workers and a new epoch."""

from __future__ import annotations

from controlplane.decisions.actions import FormReplica, RemoveReplica
from tests.unit.controlplane.world import World


def test_nothing_is_done_for_nothing(world: World) -> None:
    world.boot("w0")
    assert world.settle().actions == ()


def test_every_replica_is_formed_from_free_workers(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3", "w4")
    world.apply("a", 2, tp=2)
    assert world.formed() == ["a-0", "a-1"]
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
    assert world.formed() == ["a-0"]


def test_each_deployment_gets_its_first_replica_before_anyones_second(world: World) -> None:
    world.boot("w0", "w1")
    world.apply("a", 2)
    world.apply("b", 2)
    assert world.formed() == ["a-0", "b-0"]


def test_a_draining_worker_gets_nothing(world: World) -> None:
    world.boot("w0", draining=True)
    world.apply("a")
    assert world.formed() == []


def test_a_lost_worker_is_replaced_at_its_rank(world: World) -> None:
    world.boot("w0", "w1", "w2")
    world.serve("a", 1, tp=2)
    world.die("w0")
    assert world.formed() == ["a-0"]
    assert world.members("a-0") == ["w2", "w1"]


def test_a_worker_that_booted_again_is_a_new_member(world: World) -> None:
    world.boot("w0", "w1")
    world.serve("a", 1)
    world.boot("w0")
    assert world.formed() == ["a-0"]
    member = world.snapshot.replicas["a-0"].assignment.members[0]
    assert (member.worker, member.incarnation) == ("w0", world.snapshot.workers["w0"].incarnation)


def test_a_replica_that_lost_a_worker_is_left_until_the_worker_is_back(world: World) -> None:
    """If only the lease was lost, the engines still run: nothing is removed early."""
    world.boot("w0", "w1")
    world.serve("a", 1, tp=2)
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
    world.serve("a", 2, tp=2)
    world.die("w0")
    world.settle()
    world.die("w2")
    decision = world.settle()
    assert [type(action) for action in decision.actions[:2]] == [RemoveReplica, FormReplica]
    assert list(world.snapshot.replicas) == ["a-0"]
    assert set(world.members("a-0")) == {"w1", "w3"}


def test_scaling_keeps_the_replicas_that_are_there(world: World) -> None:
    world.boot("w0", "w1", "w2")
    world.serve("a", 1)
    before = world.snapshot.replicas["a-0"]
    world.apply("a", 3)
    assert world.formed() == ["a-1", "a-2"]
    assert world.snapshot.replicas["a-0"] == before


def test_workers_freed_by_a_removal_are_used_in_the_same_decision(world: World) -> None:
    world.boot("w0")
    world.serve("a", 1)
    world.apply("b")
    world.settle()
    world.delete("a")
    assert world.formed() == ["b-0"]
