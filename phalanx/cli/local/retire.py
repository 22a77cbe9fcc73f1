"""Deletes a local cluster's deployment when its etcd outlives the cluster.

It runs as its own process, `python -m phalanx.cli.local.retire CONTROLLER DEPLOYMENT`, because the
supervisor must not load gRPC. Best effort: a deployment that stays is reported by the next `phalanx up`
on the same cluster.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

WITHIN_S = 5.0
FILE = "deployment"


def note(state_dir: Path, deployment: str) -> None:
    """Record the deployment that was applied, so that the stop can delete it."""
    (state_dir / FILE).write_text(deployment)


def noted(state_dir: Path) -> str | None:
    """The deployment that was applied, or None."""
    try:
        return (state_dir / FILE).read_text() or None
    except FileNotFoundError:
        return None


def forget(state_dir: Path) -> None:
    """Delete the record."""
    (state_dir / FILE).unlink(missing_ok=True)


async def retire(controller: str, deployment: str) -> None:
    """Delete the deployment and wait until its replicas are gone.

    Raises:
        TimeoutError: that took more than `WITHIN_S` seconds.
        grpc.aio.AioRpcError: the controller failed or cannot be reached.
    """
    from phalanx.runtime import rpc
    from phalanx.v1 import control_pb2, control_pb2_grpc

    async with asyncio.timeout(WITHIN_S), rpc.channel(controller) as channel:
        stub: Any = control_pb2_grpc.ControlServiceStub(channel)
        await stub.DeleteDeployment(control_pb2.DeleteDeploymentRequest(name=deployment))
        async for view in stub.Watch(control_pb2.WatchRequest()):
            if all(replica.deployment != deployment for replica in view.replicas):
                return


if __name__ == "__main__":
    asyncio.run(retire(sys.argv[1], sys.argv[2]))
