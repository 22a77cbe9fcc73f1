"""A record that cannot be decoded: readers ignore it, and the controller replaces or removes it."""

from __future__ import annotations

import logging

import pytest

from controlplane.decisions.actions import FormReplica, RemoveReplica
from controlplane.status import views
from phalanx.internal.v1 import state_pb2
from phalanx.store.interface import Put
from phalanx.store.records import (
    AssignmentRecord,
    DeploymentRecord,
    MemberRecord,
    ShardRecord,
    ShardState,
    encode,
)
from phalanx.v1 import control_pb2
from tests.unit.controlplane.world import World, instantly

GARBAGE = b"\xff\xff\xff"
NOT_UTF8 = b"\x0a\x01\xff"  # field 1, text of one byte


@pytest.fixture
def world() -> World:
    """Deployment a serves on w0; w1 is free."""
    world = World()
    world.boot("w0", "w1")
    world.apply("a")
    world.settle()
    world.ready("a-0")
    world.settle()
    return world


def write(world: World, path: str, value: bytes = GARBAGE) -> int:
    revision = instantly(world.store.txn([], [Put(world.keys.root + path, value)]))
    assert revision is not None
    return revision


@pytest.mark.parametrize("value", [GARBAGE, NOT_UTF8])
@pytest.mark.parametrize(
    "path",
    [
        "deployments/b",
        "workers/w9",
        "gateways/g",
        "replicas/b-0/assignment",
        "replicas/b-0/ready",
        "replicas/a-0/shards/7",
        "controller/leader",
    ],
)
def test_a_record_that_cannot_be_read_is_passed_over_alone(
    world: World, caplog: pytest.LogCaptureFixture, path: str, value: bytes
) -> None:
    whole = world.snapshot
    revision = write(world, path, value)
    with caplog.at_level(logging.WARNING):
        snapshot = world.snapshot
    assert dict(snapshot.unreadable) == {path: revision}
    assert [vars(record)["keys"] for record in caplog.records] == [[path]]
    assert (snapshot.deployments, snapshot.workers, snapshot.replicas, snapshot.shards) == (
        whole.deployments,
        whole.workers,
        whole.replicas,
        whole.shards,
    )
    views(snapshot, world.now)


@pytest.mark.parametrize("rank", ["x", "-1", "01", " 1", ""])
def test_a_rank_that_is_no_number_is_passed_over(world: World, rank: str) -> None:
    record = ShardRecord("a-0", 1, 1, "w1", "boot", ShardState.READY)
    write(world, f"replicas/a-0/shards/{rank}", encode(record))
    assert list(world.snapshot.shards) == [("a-0", 0)]


@pytest.mark.parametrize("number", [0, 99])
def test_a_shard_state_that_is_not_known_is_starting(world: World, number: int) -> None:
    record = world.snapshot.shards["a-0", 0]
    message = state_pb2.ShardRecord.FromString(encode(record))
    message.state = number  # type: ignore[assignment]  # as a newer worker may
    write(world, "replicas/a-0/shards/0", message.SerializeToString())
    shard = world.snapshot.shard("a-0", 0)
    assert shard is not None
    assert shard.state is ShardState.STARTING
    assert views(world.snapshot, world.now).replicas["a-0"].state == control_pb2.REPLICA_STATE_FORMING


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (2**32 - 1, 1, 1), (1, 1025, 1)])
def test_a_deployment_without_a_possible_shape_is_passed_over(
    world: World, shape: tuple[int, int, int]
) -> None:
    write(world, "deployments/b", encode(DeploymentRecord("b", 1, "/m", *shape)))
    assert list(world.snapshot.deployments) == ["a"]
    assert world.settle().actions == ()


def test_an_assignment_with_too_few_members_is_passed_over(world: World) -> None:
    member = MemberRecord("w1", "boot", "w1:1")
    record = AssignmentRecord("b-0", DeploymentRecord("b", 1, "/m", tp=2), (member,))
    write(world, "replicas/b-0/assignment", encode(record))
    assert list(world.snapshot.replicas) == ["a-0"]


def test_a_wanted_replica_whose_assignment_cannot_be_read_is_formed_over_it(world: World) -> None:
    epoch = write(world, "replicas/a-0/assignment")
    (form, *_) = world.settle().actions
    assert isinstance(form, FormReplica)
    assert (form.assignment.replica, form.epoch) == ("a-0", epoch)
    assert world.members("a-0")


def test_an_assignment_that_names_no_worker_is_formed_again(world: World) -> None:
    world.put(world.keys.assignment("a-0"), AssignmentRecord("a-0", world.snapshot.deployments["a"], ()))
    world.settle()
    assert world.members("a-0")


def test_an_unwanted_assignment_that_cannot_be_read_is_removed(world: World) -> None:
    epoch = write(world, "replicas/b-0/assignment")
    assert world.settle().actions == (RemoveReplica("b-0", epoch),)
    assert not world.snapshot.unreadable


@pytest.mark.parametrize("name", ["odd", "-1", "odd-", "odd-x", "a-0-x"])
def test_a_replica_whose_name_has_no_index_is_removed(world: World, name: str) -> None:
    member = world.snapshot.replicas["a-0"].assignment.members[0]
    record = AssignmentRecord(name, world.snapshot.deployments["a"], (member,))
    epoch = write(world, f"replicas/{name}/assignment", encode(record))
    views(world.snapshot, world.now)
    assert RemoveReplica(name, epoch) in world.settle().actions
    assert list(world.snapshot.replicas) == ["a-0"]


def test_replicas_of_a_deployment_that_cannot_be_read_stay_with_their_workers(world: World) -> None:
    write(world, "deployments/a")
    world.apply("b", 2)
    assert world.settle().shortages
    assert world.members("a-0") == ["w0"]
    assert world.members("b-0") == ["w1"]
