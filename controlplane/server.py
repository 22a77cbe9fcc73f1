"""ControlService: the API of operators. Every controller serves it, whether or not it is the active one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import grpc

from controlplane.deployments import Deployments
from controlplane.status import Views, views
from controlplane.view import View
from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError
from phalanx.runtime.filters import Fields
from phalanx.runtime.paging import page
from phalanx.store.interface import Listing, Store, StoreUnavailableError
from phalanx.store.keys import Keys
from phalanx.store.records import DeploymentRecord
from phalanx.v1 import control_pb2, control_pb2_grpc

SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name

# The fields that control.proto documents for the filter of each list method.
DEPLOYMENT_FIELDS = Fields(control_pb2.Deployment.DESCRIPTOR, "spec.name", "spec.model", "state")
REPLICA_FIELDS = Fields(control_pb2.Replica.DESCRIPTOR, "replica", "deployment", "state")
WORKER_FIELDS = Fields(
    control_pb2.Worker.DESCRIPTOR, "worker", "host", "device", "state", "deployment", "replica"
)
GATEWAY_FIELDS = Fields(control_pb2.Gateway.DESCRIPTOR, "gateway", "host")

Context = grpc.aio.ServicerContext[Any, Any]
Message = TypeVar("Message")


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """protos/phalanx/v1/control.proto has the contract of each method.

    Owns: nothing. Reads come from the view. Writes go to the store (`Deployments`).
    """

    def __init__(self, store: Store, keys: Keys, view: View, clock: Callable[[], float] = time.time) -> None:
        self._deployments = Deployments(store, keys, view, clock)
        self._view = view
        self._clock = clock

    async def ApplyDeployment(
        self, request: control_pb2.ApplyDeploymentRequest, context: Context
    ) -> control_pb2.ApplyDeploymentResponse:
        """Create a deployment or change its spec."""
        async with _typed_errors(context):
            record, changed = await self._deployments.apply(
                request.spec, request.etag, validate_only=request.validate_only
            )
            deployment = self._views(record).deployments[record.name]
            if request.validate_only and changed:
                deployment.ClearField("etag")  # an etag names a stored version; this one is not stored
            return control_pb2.ApplyDeploymentResponse(deployment=deployment, changed=changed)

    async def GetDeployment(
        self, request: control_pb2.GetDeploymentRequest, context: Context
    ) -> control_pb2.GetDeploymentResponse:
        """Show one deployment."""
        async with _typed_errors(context):
            deployment = _one("deployment", self._views().deployments, request.name)
            return control_pb2.GetDeploymentResponse(deployment=deployment)

    async def ListDeployments(
        self, request: control_pb2.ListDeploymentsRequest, context: Context
    ) -> control_pb2.ListDeploymentsResponse:
        """List deployments."""
        async with _typed_errors(context):
            deployments, token = page(self._views().deployments, request, DEPLOYMENT_FIELDS)
            return control_pb2.ListDeploymentsResponse(deployments=deployments, next_page_token=token)

    async def DeleteDeployment(
        self, request: control_pb2.DeleteDeploymentRequest, context: Context
    ) -> control_pb2.DeleteDeploymentResponse:
        """Remove a deployment and its replicas."""
        async with _typed_errors(context):
            await self._deployments.delete(request.name, request.etag, validate_only=request.validate_only)
            return control_pb2.DeleteDeploymentResponse()

    async def GetReplica(
        self, request: control_pb2.GetReplicaRequest, context: Context
    ) -> control_pb2.GetReplicaResponse:
        """Show one replica and its shards."""
        async with _typed_errors(context):
            replica = _one("replica", self._views().replicas, request.name)
            return control_pb2.GetReplicaResponse(replica=replica)

    async def ListReplicas(
        self, request: control_pb2.ListReplicasRequest, context: Context
    ) -> control_pb2.ListReplicasResponse:
        """List replicas and their shards."""
        async with _typed_errors(context):
            replicas, token = page(self._views().replicas, request, REPLICA_FIELDS)
            return control_pb2.ListReplicasResponse(replicas=replicas, next_page_token=token)

    async def GetWorker(
        self, request: control_pb2.GetWorkerRequest, context: Context
    ) -> control_pb2.GetWorkerResponse:
        """Show one worker and what it runs."""
        async with _typed_errors(context):
            worker = _one("worker", self._views().workers, request.name)
            return control_pb2.GetWorkerResponse(worker=worker)

    async def ListWorkers(
        self, request: control_pb2.ListWorkersRequest, context: Context
    ) -> control_pb2.ListWorkersResponse:
        """List workers and what they run."""
        async with _typed_errors(context):
            workers, token = page(self._views().workers, request, WORKER_FIELDS)
            return control_pb2.ListWorkersResponse(workers=workers, next_page_token=token)

    async def GetGateway(
        self, request: control_pb2.GetGatewayRequest, context: Context
    ) -> control_pb2.GetGatewayResponse:
        """Show one gateway."""
        async with _typed_errors(context):
            gateway = _one("gateway", self._views().gateways, request.name)
            return control_pb2.GetGatewayResponse(gateway=gateway)

    async def ListGateways(
        self, request: control_pb2.ListGatewaysRequest, context: Context
    ) -> control_pb2.ListGatewaysResponse:
        """List gateways."""
        async with _typed_errors(context):
            gateways, token = page(self._views().gateways, request, GATEWAY_FIELDS)
            return control_pb2.ListGatewaysResponse(gateways=gateways, next_page_token=token)

    # Writes to the context instead of yielding: when a client leaves, gRPC cancels the handler at its await.
    async def Watch(self, request: control_pb2.WatchRequest, context: Context) -> None:  # type: ignore[override]
        """Stream the cluster's state. Changes in quick succession may come as one response."""
        seen: Listing | None = None
        while True:
            await self._view.newer(seen)
            seen, shown = self._view.listing, self._views()
            response = control_pb2.WatchResponse(
                revision=self._view.snapshot.revision,
                deployments=shown.deployments.values(),
                replicas=shown.replicas.values(),
                workers=shown.workers.values(),
                gateways=shown.gateways.values(),
            )
            await context.write(response)

    def _views(self, applied: DeploymentRecord | None = None) -> Views:
        """The cluster as messages. `applied` replaces the stored record of its deployment."""
        if self._view.listing is None:
            raise PhalanxError("STORE_UNAVAILABLE", "this controller has not reached the store yet")
        snapshot = self._view.snapshot
        if applied is not None:
            snapshot = replace(snapshot, deployments={**snapshot.deployments, applied.name: applied})
        return views(snapshot, self._clock())


def _one(kind: str, messages: Mapping[str, Message], name: str) -> Message:
    """The message of this name. Raises PhalanxError UNKNOWN_<KIND>."""
    if name not in messages:
        raise PhalanxError(f"UNKNOWN_{kind.upper()}", f"there is no {kind} {name!r}")
    return messages[name]


@contextlib.asynccontextmanager
async def _typed_errors(context: Context) -> AsyncIterator[None]:
    """End the call with ErrorInfo when the body raises an expected error."""
    try:
        yield
    except PhalanxError as error:
        await rpc.abort(context, error)
    except StoreUnavailableError as error:
        await rpc.abort(context, PhalanxError("STORE_UNAVAILABLE", str(error)))
