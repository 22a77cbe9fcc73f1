"""ControlService: what operators ask of any controller, leading or not."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from controlplane.status import Views, views
from controlplane.validation import check_model, check_spec
from controlplane.view import View
from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError
from phalanx.store.interface import Delete, Entry, Listing, Modified, Put, Store, StoreUnavailableError
from phalanx.store.keys import Keys
from phalanx.store.records import DeploymentRecord, LayoutRecord, decode, encode
from phalanx.v1 import control_pb2, control_pb2_grpc

SERVICE = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class ControlService(control_pb2_grpc.ControlServiceServicer):
    """Each method's contract is in protos/phalanx/v1/control.proto.

    Owns: nothing. Reads come from the view, writes go to the store and are answered once the view has
    them, so that a caller who reads next sees what it wrote.
    """

    def __init__(self, store: Store, keys: Keys, view: View, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._keys = keys
        self._view = view
        self._clock = clock

    async def ApplyDeployment(
        self, request: control_pb2.ApplyDeploymentRequest, context: Context
    ) -> control_pb2.ApplyDeploymentResponse:
        """Create a deployment or change its shape."""
        async with _typed_errors(context):
            spec = request.spec
            check_spec(spec)
            smaller = await asyncio.to_thread(
                check_model, spec.model, spec.tp or 1, spec.pp or 1, spec.load_format
            )
            changed = await self._apply(spec, () if spec.fixed_layout else smaller)
            deployment = self._views().deployments.get(spec.name)
            if deployment is None:
                raise PhalanxError("UNKNOWN_DEPLOYMENT", f"deployment {spec.name} was deleted meanwhile")
            return control_pb2.ApplyDeploymentResponse(deployment=deployment, changed=changed)

    async def GetDeployment(
        self, request: control_pb2.GetDeploymentRequest, context: Context
    ) -> control_pb2.GetDeploymentResponse:
        """Show one deployment."""
        async with _typed_errors(context):
            deployment = self._views().deployments.get(request.name)
            if deployment is None:
                raise _unknown(request.name)
            return control_pb2.GetDeploymentResponse(deployment=deployment)

    async def ListDeployments(
        self, request: control_pb2.ListDeploymentsRequest, context: Context
    ) -> control_pb2.ListDeploymentsResponse:
        """Show every deployment."""
        async with _typed_errors(context):
            return control_pb2.ListDeploymentsResponse(deployments=self._views().deployments.values())

    async def DeleteDeployment(
        self, request: control_pb2.DeleteDeploymentRequest, context: Context
    ) -> control_pb2.DeleteDeploymentResponse:
        """Remove a deployment and its replicas."""
        async with _typed_errors(context):
            key, revision = self._keys.deployment(request.name), None
            while revision is None:
                entry = await self._store.get(key)
                if entry is None:
                    raise _unknown(request.name)
                revision = await self._store.txn([Modified(key, entry.mod_revision)], [Delete(key)])
            await self._view.reached(revision)
            return control_pb2.DeleteDeploymentResponse()

    async def ListWorkers(
        self, request: control_pb2.ListWorkersRequest, context: Context
    ) -> control_pb2.ListWorkersResponse:
        """Show every worker and what it runs."""
        async with _typed_errors(context):
            return control_pb2.ListWorkersResponse(workers=self._views().workers.values())

    async def ListReplicas(
        self, request: control_pb2.ListReplicasRequest, context: Context
    ) -> control_pb2.ListReplicasResponse:
        """Show every replica and its shards."""
        async with _typed_errors(context):
            return control_pb2.ListReplicasResponse(replicas=self._views().replicas.values())

    async def ListGateways(
        self, request: control_pb2.ListGatewaysRequest, context: Context
    ) -> control_pb2.ListGatewaysResponse:
        """Show every gateway."""
        async with _typed_errors(context):
            return control_pb2.ListGatewaysResponse(gateways=self._views().gateways.values())

    # Written to the context rather than yielded: a client that leaves cancels the handler where it waits.
    async def Watch(self, request: control_pb2.WatchRequest, context: Context) -> None:  # type: ignore[override]
        """Stream the cluster as it is and whenever it changes; what piled up comes as one response."""
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

    def _views(self) -> Views:
        if self._view.listing is None:
            raise PhalanxError("STORE_UNAVAILABLE", "this controller has not reached the store yet")
        return views(self._view.snapshot, self._clock())

    async def _apply(self, spec: control_pb2.DeploymentSpec, fallbacks: tuple[LayoutRecord, ...]) -> bool:
        """Write the deployment unless it is as asked; returns whether it was written."""
        key = self._keys.deployment(spec.name)
        while True:
            entry = await self._store.get(key)
            old = _readable(entry)
            new = _record(spec, fallbacks, old, self._clock())
            if new == old:
                return False
            guard = Modified(key, entry.mod_revision if entry else 0)
            revision = await self._store.txn([guard], [Put(key, encode(new))])
            if revision is not None:
                await self._view.reached(revision)
                return True


def _readable(entry: Entry | None) -> DeploymentRecord | None:
    """The deployment in the store; one that cannot be read is replaced as if it were not there."""
    try:
        return decode(DeploymentRecord, entry.value) if entry else None
    except (ValueError, DecodeError):
        return None


def _record(
    spec: control_pb2.DeploymentSpec,
    fallbacks: tuple[LayoutRecord, ...],
    old: DeploymentRecord | None,
    now: float,
) -> DeploymentRecord:
    """What `spec` asks for: `old` itself when that is the same, else its next revision."""
    asked = DeploymentRecord(
        name=spec.name,
        revision=old.revision if old else 1,
        model=spec.model,
        replicas=spec.replicas or 1,
        tp=spec.tp or 1,
        pp=spec.pp or 1,
        dtype=spec.dtype,
        max_model_len=spec.max_model_len,
        created_at=old.created_at if old else now,
        load_format="" if spec.load_format == "auto" else spec.load_format,
        quantization=spec.quantization,
        fixed_layout=spec.fixed_layout,
        fallbacks=fallbacks,
    )
    return asked if old is None or asked == old else replace(asked, revision=old.revision + 1)


def _unknown(name: str) -> PhalanxError:
    return PhalanxError("UNKNOWN_DEPLOYMENT", f"there is no deployment {name!r}")


@contextlib.asynccontextmanager
async def _typed_errors(context: Context) -> AsyncIterator[None]:
    """End the call with ErrorInfo when the body fails as expected."""
    try:
        yield
    except PhalanxError as error:
        await rpc.abort(context, error)
    except StoreUnavailableError as error:
        await rpc.abort(context, PhalanxError("STORE_UNAVAILABLE", str(error)))
