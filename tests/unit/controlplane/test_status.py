from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane import status
from controlplane.decisions.degrade import DEGRADE_AFTER_S
from controlplane.decisions.health import ReplicaState
from controlplane.decisions.reshape import GROW_AFTER_S
from controlplane.status import Views, views
from phalanx.runtime.enums import word
from phalanx.store.records import DeploymentRecord, GatewayRecord, LayoutRecord, ShardState
from phalanx.v1 import control_pb2
from tests.unit.controlplane.world import World


@pytest.fixture
def world() -> World:
    return World()


def seen(world: World) -> Views:
    return views(world.snapshot, world.now)


def says(
    message: control_pb2.Deployment | control_pb2.Replica | control_pb2.Worker | control_pb2.Shard,
) -> str:
    """The state as people read it."""
    return word(message.DESCRIPTOR.fields_by_name["state"].enum_type, message.state)


def deployment(world: World) -> control_pb2.Deployment:
    return seen(world).deployments["a"]


def replica(world: World, name: str = "a-0") -> control_pb2.Replica:
    return seen(world).replicas[name]


def test_a_deployment_without_enough_workers_is_pending_and_says_what_it_needs(world: World) -> None:
    world.boot("w0")
    world.apply("a", tp=2, pp=2)
    world.settle()
    shown = deployment(world)
    assert (says(shown), shown.ready_replicas) == ("pending", 0)
    assert shown.reason == "a-0 needs 4 workers (tp=2 x pp=2), 1 is free"


def test_a_deployment_is_progressing_until_every_replica_is_ready(world: World) -> None:
    world.boot("w0", "w1")
    world.apply("a", 2)
    assert says(deployment(world)) == "progressing"
    world.settle()
    world.ready("a-0")
    shown = deployment(world)
    assert (says(shown), shown.ready_replicas) == ("progressing", 1)
    assert shown.reason == "a-1 is forming: shards: 0 assigned"
    world.ready("a-1")
    assert (says(deployment(world)), deployment(world).reason) == ("ready", "")
    assert deployment(world).ready_replicas == 2


def test_a_deployment_that_fails_for_good_is_failed_with_the_shards_reason(world: World) -> None:
    world.boot("w0", "w1")
    world.apply("a", tp=2)
    world.settle()
    world.fail("a-0", 1, reason="no model.norm.weight", permanent=True)
    world.fail("a-0", 0, reason="shard 1 failed: no model.norm.weight", permanent=True)
    shown = deployment(world)
    assert says(shown) == "failed"
    assert shown.reason == "a-0 is failed: shard 1: no model.norm.weight; tries again in 30 s"


def test_a_deployment_whose_replicas_have_the_old_shape_is_not_ready(world: World) -> None:
    world.boot("w0")
    world.apply("a")
    world.settle()
    world.ready("a-0")
    world.apply("a", model="/models/two")
    shown = deployment(world)
    assert (says(shown), shown.ready_replicas) == ("progressing", 1)
    assert shown.reason == "a-0 still has the shape of revision 1"


def test_a_deployment_in_a_smaller_layout_is_degraded_and_says_what_it_needs(world: World) -> None:
    world.boot("w0", "w1")
    world.apply("a", tp=2, fallbacks=(LayoutRecord(1, 1),))
    world.settle()
    world.ready("a-0")
    world.settle()
    world.die("w1")
    world.settle()
    world.now += DEGRADE_AFTER_S
    world.settle()
    assert says(deployment(world)) == "progressing"
    assert deployment(world).reason.startswith("a-0 runs in tp=1 x pp=1")
    world.ready("a-0")
    world.settle()
    world.now += GROW_AFTER_S
    shown = deployment(world)
    assert (says(shown), shown.ready_replicas) == ("degraded", 1)
    assert shown.reason == "a-0 runs in tp=1 x pp=1: needs 2 workers (tp=2 x pp=1), 1 is free"
    assert (replica(world).tp, replica(world).pp, len(replica(world).shards)) == (1, 1, 1)


def test_a_deployment_says_that_no_controller_leads(world: World) -> None:
    world.apply("a")
    world.store._clock = lambda: world.now + 10**10
    world.store.expire()
    assert deployment(world).reason.endswith("; no controller is active")


def test_a_deployments_spec_is_shown_as_stored(world: World) -> None:
    world.apply("a", 2, tp=2)
    shown = deployment(world)
    assert shown.revision == 1
    assert (shown.spec.name, shown.spec.model) == ("a", "/models/one")
    assert (shown.spec.replicas, shown.spec.tp, shown.spec.pp) == (2, 2, 1)


def test_a_forming_replica_shows_its_shards_in_the_rank_grid(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    world.apply("a", tp=2, pp=2)
    world.settle()
    world.report("a-0", ShardState.STARTING, 1)
    world.report("a-0", ShardState.READY, 2)
    shown = replica(world)
    assert (says(shown), shown.deployment, shown.revision) == ("forming", "a", 1)
    assert shown.epoch == world.snapshot.replicas["a-0"].epoch
    assert shown.reason == "shards: 0 assigned, 1 starting, 3 assigned"
    places = [(shard.rank, shard.pp_rank, shard.tp_rank, shard.worker) for shard in shown.shards]
    assert places == [(0, 0, 0, "w0"), (1, 0, 1, "w1"), (2, 1, 0, "w2"), (3, 1, 1, "w3")]
    assert [says(shard) for shard in shown.shards] == ["assigned", "starting", "ready", "assigned"]


def test_a_replica_that_lost_a_worker_names_it(world: World) -> None:
    world.boot("w0", "w1")
    world.apply("a", tp=2)
    world.settle()
    world.ready("a-0")
    world.settle()
    world.die("w1")
    shown = replica(world)
    assert says(shown) == "failed"
    assert shown.reason == "lost worker w1; needs 2 workers (tp=2 x pp=1), 1 is free"
    assert [says(shard) for shard in shown.shards] == ["ready", "lost"]


def test_a_replica_in_back_off_says_when_and_how_often_it_failed(world: World) -> None:
    world.boot("w0")
    world.apply("a")
    world.settle()
    world.fail("a-0")
    world.settle()
    world.fail("a-0", reason="out of memory")
    assert replica(world).reason == "shard 0: out of memory; tries again in 1 s, 2 failures in a row"


def test_a_worker_shows_what_it_runs(world: World) -> None:
    world.boot("w0", "w1", "w2")
    world.apply("a", tp=2)
    world.settle()
    world.report("a-0", ShardState.FAILED, 1, reason="killed")
    shown = seen(world).workers
    assert [says(shown[name]) for name in ("w0", "w1", "w2")] == ["assigned", "failed", "free"]
    failed = shown["w1"]
    assert (failed.deployment, failed.replica, failed.tp_rank, failed.pp_rank) == ("a", "a-0", 1, 0)
    assert failed.epoch == world.snapshot.replicas["a-0"].epoch
    assert (failed.reason, failed.address, failed.device) == ("killed", "w1:1", "cpu")


def test_a_free_worker_leaves_what_does_not_apply_unset(world: World) -> None:
    world.boot("w0")
    shown = seen(world).workers["w0"]
    unset = ("deployment", "replica", "epoch", "tp_rank", "pp_rank", "engine_pid", "text_pid", "reason")
    assert [name for name in unset if shown.HasField(name)] == []


def test_a_worker_that_booted_again_is_free(world: World) -> None:
    world.boot("w0")
    world.apply("a")
    world.settle()
    world.boot("w0")
    assert says(seen(world).workers["w0"]) == "free"


def test_a_draining_worker_is_draining_whatever_it_runs(world: World) -> None:
    world.boot("w0")
    world.apply("a")
    world.settle()
    world.fail("a-0", reason="killed")
    for ailment, reason in (("", "killed"), ("ECC errors", "ECC errors")):
        record = replace(world.snapshot.workers["w0"], draining=True, ailment=ailment)
        world.put(world.keys.worker("w0"), record)
        shown = seen(world).workers["w0"]
        assert (says(shown), shown.replica, shown.reason) == ("draining", "a-0", reason)


def test_a_gateway_is_shown_as_registered(world: World) -> None:
    record = GatewayRecord("g0", "boot", "host", "127.0.0.1:1", "http://127.0.0.1:2", 7)
    world.put(world.keys.gateway("g0"), record)
    shown = seen(world).gateways["g0"]
    assert (shown.gateway, shown.grpc_address, shown.http_url) == ("g0", "127.0.0.1:1", "http://127.0.0.1:2")
    assert shown.pid == 7


def test_a_deployment_says_when_it_was_created(world: World) -> None:
    record = DeploymentRecord("a", 1, "/models/one", created_at=1_700_000_000.25)
    world.put(world.keys.deployment("a"), record)
    assert deployment(world).create_time.ToJsonString() == "2023-11-14T22:13:20.250Z"


def test_every_state_of_a_replica_and_a_shard_has_a_message() -> None:
    assert set(status._REPLICA_STATES) == set(ReplicaState)
    assert set(status._SHARD_STATES) == set(ShardState)
