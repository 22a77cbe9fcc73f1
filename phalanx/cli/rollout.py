"""Applies a deployment and waits until clients can use it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from phalanx.cli.failure import Failure

_RETRY_S = 0.2
Say = Callable[[str], None]


async def roll_out(controller: str, gateway: str, spec: Any, say: Say, applied: Callable[[], None]) -> None:
    """Apply a DeploymentSpec, then wait until every replica is ready and the gateway routes to it.

    `applied` is called as soon as the controller has taken it.

    Raises:
        Failure: the controller refuses the deployment, or gives it up.
    """
    from phalanx.runtime import rpc
    from phalanx.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc

    async with rpc.channel(controller) as control, rpc.channel(gateway) as inference:
        stub: Any = control_pb2_grpc.ControlServiceStub(control)
        request = control_pb2.ApplyDeploymentRequest(spec=spec)
        await _persist(lambda: _warn_of_others(stub, spec.name, say))
        await _persist(lambda: stub.ApplyDeployment(request, wait_for_ready=True))
        applied()
        await _persist(lambda: _until_ready(stub, spec.name, say))
        models = inference_pb2_grpc.InferenceServiceStub(inference)
        await _persist(lambda: _until_routable(models, spec.name, spec.replicas))


async def _persist(attempt: Callable[[], Any]) -> None:
    """Try until it succeeds, or the server says that trying again will not help."""
    import grpc

    from phalanx.runtime import rpc

    passing = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
    while True:
        try:
            await attempt()
        except grpc.aio.AioRpcError as error:
            if error.code() not in passing:
                raise Failure(rpc.to_error(error).message) from error
            await asyncio.sleep(_RETRY_S)
        else:
            return


async def _warn_of_others(stub: Any, name: str, say: Say) -> None:
    """Say what is in the cluster already: an etcd may have been used before."""
    from phalanx.v1 import control_pb2

    answer = await stub.ListDeployments(control_pb2.ListDeploymentsRequest(), wait_for_ready=True)
    others = [item.spec.name for item in answer.deployments if item.spec.name != name]
    if others:
        say(
            f"warning: this cluster already has {', '.join(others)}, which may take its workers; "
            "`phalanx delete deployment NAME` removes one, and --cluster gives the cluster another name"
        )


async def _until_ready(stub: Any, name: str, say: Say) -> None:
    from phalanx.v1 import control_pb2

    async for view in stub.Watch(control_pb2.WatchRequest()):
        deployment = next((item for item in view.deployments if item.spec.name == name), None)
        if deployment is None:
            continue
        say(describe(deployment, view.replicas))
        if deployment.state == "failed":
            raise Failure(f"deployment {name} failed: {deployment.reason}")
        if deployment.state == "ready":
            return


async def _until_routable(stub: Any, name: str, replicas: int) -> None:
    """A replica that is ready is not yet one that the gateway knows."""
    from phalanx.v1 import inference_pb2

    while True:
        answer = await stub.ListModels(inference_pb2.ListModelsRequest(), wait_for_ready=True)
        if any(model.name == name and model.ready_replicas >= replicas for model in answer.models):
            return
        await asyncio.sleep(_RETRY_S)


def describe(deployment: Any, replicas: Any) -> str:
    """How a deployment is doing, in a line: the reasons of its shards where it has none itself."""
    spec = deployment.spec
    line = f"deployment {spec.name} is {deployment.state}: "
    line += f"{deployment.ready_replicas} of {spec.replicas} replicas ready"
    reasons = [
        f"{shard.worker}: {shard.reason}"
        for replica in replicas
        if replica.deployment == spec.name
        for shard in replica.shards
        if shard.reason
    ]
    reason = deployment.reason or "; ".join(reasons)
    return f"{line} ({reason})" if reason else line
