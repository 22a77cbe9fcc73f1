"""What is removed, and when."""

from __future__ import annotations

from controlplane.decisions.actions import PruneShard, RemoveReplica
from controlplane.decisions.degrade import DEGRADE_AFTER_S
from phalanx.store.records import LayoutRecord
from tests.unit.controlplane.world import World


def test_scaling_down_removes_the_highest_index_first(world: World) -> None:
    world.boot("w0", "w1", "w2")
    world.serve("a", 3)
    world.apply("a", 1)
    removed = [action.replica for action in world.settle().actions if isinstance(action, RemoveReplica)]
    assert removed == ["a-2", "a-1"]
    assert list(world.snapshot.replicas) == ["a-0"]


def test_deleting_a_deployment_removes_all_of_it(world: World) -> None:
    world.boot("w0", "w1")
    world.serve("a", 1, tp=2)
    world.delete("a")
    world.settle()
    assert [key for key in world.listing.entries if "/replicas/" in key] == []


def test_a_shard_status_written_after_the_removal_is_deleted(world: World) -> None:
    world.boot("w0")
    world.serve("a", 1)
    late = world.snapshot.shards["a-0", 0]
    world.delete("a")
    world.settle()
    world.put(world.keys.shard("a-0", 0), late)
    assert world.settle().actions == (PruneShard("a-0", 0),)


def test_that_a_replica_had_served_is_forgotten_with_its_deployment(world: World) -> None:
    world.boot("w0", "w1")
    world.serve("a", 1, tp=2, fallbacks=(LayoutRecord(1, 1),))
    world.delete("a")
    world.settle()
    assert not world.snapshot.ready
    world.die("w0")
    world.apply("a", 1, 2, 1, fallbacks=(LayoutRecord(1, 1),))
    assert world.formed() == []
    world.now += 2 * DEGRADE_AFTER_S
    assert world.formed() == []
