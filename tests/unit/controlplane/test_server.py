"""ControlService: deployments, the store's absence, Watch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controlplane import active_controller
from phalanx.runtime import rpc
from phalanx.store.interface import Listing, Put
from phalanx.store.records import ControllerRecord
from phalanx.v1 import control_pb2
from tests.unit.controlplane.conftest import KEYS, Controller, model_dir


async def test_a_new_deployment_has_the_defaults_and_is_read_back(controller: Controller) -> None:
    answer = await controller.apply()
    assert answer.changed
    assert answer.deployment.revision == 1
    spec = answer.deployment.spec
    assert (spec.replicas, spec.tp, spec.pp, spec.dtype, spec.max_model_len) == (1, 1, 1, "", 0)
    request = control_pb2.GetDeploymentRequest(name="a")
    assert (await controller.stub.GetDeployment(request)).deployment == answer.deployment


async def test_applying_the_same_again_changes_nothing(controller: Controller) -> None:
    await controller.apply(replicas=2)
    answer = await controller.apply(replicas=2)
    assert not answer.changed
    assert answer.deployment.revision == 1


async def test_applying_a_change_makes_the_next_revision(controller: Controller) -> None:
    created = (await controller.apply()).deployment.create_time
    answer = await controller.apply(replicas=3)
    assert answer.changed
    assert (answer.deployment.revision, answer.deployment.spec.replicas) == (2, 3)
    assert answer.deployment.create_time == created


async def test_concurrent_changes_are_all_made(controller: Controller) -> None:
    await asyncio.gather(*(controller.apply(replicas=number) for number in range(2, 8)))
    shown = (await controller.stub.ListDeployments(control_pb2.ListDeploymentsRequest())).deployments
    assert [deployment.revision for deployment in shown] == [6]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"name": ""}, "name"),
        ({"name": "Upper"}, "name"),
        ({"name": "-a"}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "a" * 64}, "name"),
        ({"model": ""}, "model must be a directory"),
        ({"model": "/" + "m" * 4096}, "model must have at most 4096 characters"),
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"tp": 0}, "tp must be at least 1"),
        ({"pp": 0}, "pp must be at least 1"),
        ({"replicas": 1025}, "replicas must be at most 1024"),
        ({"tp": 1025}, "tp must be at most 1024"),
        ({"pp": 2**32 - 1}, "pp must be at most 1024"),
        ({"dtype": "int4"}, "float32, bfloat16, float16"),
        ({"load_format": "magic"}, "load_format must be one of auto, dummy"),
        ({"quantization": "int3"}, "quantization must be one of int8, int4, fp8"),
    ],
)
async def test_a_bad_field_is_refused_with_its_name(
    controller: Controller, spec: dict[str, object], says: str
) -> None:
    error = await controller.refused(**spec)
    assert error.reason == "INVALID_ARGUMENT"
    assert says in error.message
    assert controller.view.snapshot.deployments == {}


async def test_a_model_directory_without_weights_is_refused(controller: Controller, tmp_path: Path) -> None:
    error = await controller.refused(model=model_dir(tmp_path, weights=False))
    assert error.reason == "INVALID_MODEL"
    assert "has no weights" in error.message
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_random_weights_need_no_files(controller: Controller, tmp_path: Path) -> None:
    model = model_dir(tmp_path, weights=False)
    answer = await controller.apply(model=model, load_format="dummy", quantization="int8")
    spec = answer.deployment.spec
    assert (spec.load_format, spec.quantization) == ("dummy", "int8")


async def test_to_say_auto_is_to_say_nothing(controller: Controller) -> None:
    await controller.apply()
    assert not (await controller.apply(load_format="auto")).changed


async def test_tp_that_does_not_divide_the_heads_is_refused(controller: Controller, tmp_path: Path) -> None:
    model = model_dir(tmp_path, weights=True)
    error = await controller.refused(model=model, tp=3)
    assert error.reason == "INVALID_LAYOUT"
    assert error.message == "TP 3 does not divide the 4 attention heads"
    assert (await controller.apply(model=model, tp=2, pp=2)).changed


async def test_the_layout_is_refused_before_the_weights_are_looked_at(
    controller: Controller, tmp_path: Path
) -> None:
    error = await controller.refused(model=model_dir(tmp_path, weights=False), tp=3)
    assert error.reason == "INVALID_LAYOUT"


async def test_applying_over_a_deployment_that_cannot_be_read_replaces_it(controller: Controller) -> None:
    await controller.store.txn([], [Put(KEYS.deployment("a"), b"\xff")])
    assert (await controller.apply()).changed
    assert not controller.view.snapshot.unreadable


@pytest.mark.parametrize("model", ["/elsewhere/model", "/" + "m" * 300])
async def test_a_model_that_this_host_cannot_see_is_left_to_the_workers(
    controller: Controller, model: str
) -> None:
    """A file system may refuse even to look a path up: here, since a part of it is too long."""
    assert (await controller.apply(model=model)).changed


async def test_an_unknown_deployment_is_not_found(controller: Controller) -> None:
    for call in (
        controller.stub.GetDeployment(control_pb2.GetDeploymentRequest(name="b")),
        controller.stub.DeleteDeployment(control_pb2.DeleteDeploymentRequest(name="b")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND
        assert rpc.to_error(failure.value).reason == "UNKNOWN_DEPLOYMENT"


async def test_a_deleted_deployment_is_gone_when_the_call_returns(controller: Controller) -> None:
    await controller.apply()
    await controller.stub.DeleteDeployment(control_pb2.DeleteDeploymentRequest(name="a"))
    assert not (await controller.stub.ListDeployments(control_pb2.ListDeploymentsRequest())).deployments


async def test_a_write_without_the_store_is_unavailable_and_reads_go_on(controller: Controller) -> None:
    await controller.apply()
    controller.store.away = True
    error = await controller.refused(replicas=2)
    assert (error.reason, error.retryable) == ("STORE_UNAVAILABLE", True)
    shown = (await controller.stub.ListDeployments(control_pb2.ListDeploymentsRequest())).deployments
    assert [deployment.spec.name for deployment in shown] == ["a"]


async def test_watch_shows_the_cluster_at_once_and_each_change(controller: Controller) -> None:
    call = controller.stub.Watch(control_pb2.WatchRequest(), timeout=20)
    first = await call.read()
    assert isinstance(first, control_pb2.WatchResponse)
    assert not first.deployments
    await controller.apply()
    second = await call.read()
    assert isinstance(second, control_pb2.WatchResponse)
    assert [deployment.spec.name for deployment in second.deployments] == ["a"]
    assert second.revision > first.revision
    call.cancel()


async def test_health_is_served_beside_it(controller: Controller) -> None:
    request = health_pb2.HealthCheckRequest(service="")
    await health_pb2_grpc.HealthStub(controller.channel).Check(request)  # type: ignore[no-untyped-call]


async def test_a_leader_places_what_was_applied_and_the_lists_show_it(controller: Controller) -> None:
    await controller.join("w0", "w1", "w2")
    leading = asyncio.create_task(
        active_controller.run(controller.store, KEYS, controller.view, ControllerRecord("c0", "127.0.0.1:1"))
    )
    await controller.apply(tp=2)
    seen: Listing | None = None
    async with asyncio.timeout(10):
        while not controller.view.snapshot.replicas:
            await controller.view.newer(seen)
            seen = controller.view.listing
    replicas = (await controller.stub.ListReplicas(control_pb2.ListReplicasRequest())).replicas
    workers = (await controller.stub.ListWorkers(control_pb2.ListWorkersRequest())).workers
    assert [shard.worker for shard in replicas[0].shards] == ["w0", "w1"]
    assert [worker.state for worker in workers] == [
        control_pb2.WORKER_STATE_ASSIGNED,
        control_pb2.WORKER_STATE_ASSIGNED,
        control_pb2.WORKER_STATE_FREE,
    ]
    leading.cancel()
    await asyncio.wait([leading])
