"""Applies a deployment and waits until clients can use it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from phalanx.cli.control import every
from phalanx.cli.failure import Failure

_RETRY_S = 0.2
Say = Callable[[str], None]


async def roll_out(controller: str, gateway: str, spec: Any, say: Say, applied: Callable[[], None]) -> None:
    """Apply a DeploymentSpec, then wait until every replica is ready and the gateway routes to all of them.

    Calls `applied` once the controller has stored the deployment.

    Raises:
        Failure: the controller refuses the deployment, or the deployment fails for good.
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
    """Retry until the attempt succeeds. Raises Failure for an error that a retry cannot cure."""
    import grpc

    from phalanx.runtime import rpc

    temporary = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
    while True:
        try:
            await attempt()
        except grpc.aio.AioRpcError as error:
            if error.code() not in temporary:
                raise Failure(rpc.to_error(error).message) from error
            await asyncio.sleep(_RETRY_S)
        else:
            return


async def _warn_of_others(stub: Any, name: str, say: Say) -> None:
    """Warn of other deployments: an etcd that was used before may still have some."""
    from phalanx.v1 import control_pb2

    request = control_pb2.ListDeploymentsRequest()
    listed = every(stub.ListDeployments, request, "deployments", wait_for_ready=True)
    others = [item.spec.name async for item in listed if item.spec.name != name]
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
        if deployment.state == control_pb2.DEPLOYMENT_STATE_FAILED:
            raise Failure(f"deployment {name} failed: {deployment.reason}")
        if deployment.state == control_pb2.DEPLOYMENT_STATE_READY:
            return


async def _until_routable(stub: Any, name: str, replicas: int) -> None:
    """Wait until the gateway reaches this many replicas: it may learn of one after the controller."""
    from phalanx.v1 import inference_pb2

    request = inference_pb2.ListModelsRequest(filter=f'name = "{name}"')
    while True:
        answer = await stub.ListModels(request, wait_for_ready=True)
        if any(model.ready_replicas >= replicas for model in answer.models):
            return
        await asyncio.sleep(_RETRY_S)


def describe(deployment: Any, replicas: Any) -> str:
    """The state of a deployment in one line, with its reason or else those of its shards."""
    from phalanx.runtime.enums import word

    spec = deployment.spec
    state = word(deployment.DESCRIPTOR.fields_by_name["state"].enum_type, deployment.state)
    line = f"deployment {spec.name} is {state}: "
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
