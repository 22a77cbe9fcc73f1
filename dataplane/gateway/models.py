"""The models that a client can name, for gRPC and for HTTP."""

from __future__ import annotations

from dataplane.gateway.router import Router
from phalanx.runtime.times import timestamp
from phalanx.store.snapshot import Snapshot
from phalanx.v1 import inference_pb2


def models(snapshot: Snapshot, router: Router) -> list[inference_pb2.Model]:
    """One model per deployment, with the number of replicas that this gateway reaches."""
    routes = list(router.routes.values())
    found = []
    for name, deployment in sorted(snapshot.deployments.items()):
        mine = [route for route in routes if route.target.deployment == name]
        found.append(
            inference_pb2.Model(
                name=name,
                ready_replicas=len(mine),
                max_model_len=max((route.leader.max_model_len for route in mine), default=0),
                create_time=timestamp(deployment.created_at),
            )
        )
    return found
