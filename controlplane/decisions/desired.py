"""Which replicas should exist. Pure."""

from __future__ import annotations

from phalanx.store.records import DeploymentRecord
from phalanx.store.snapshot import Snapshot


def replica_name(deployment: str, index: int) -> str:
    """The name of a deployment's replica. Different arguments give different names."""
    return f"{deployment}-{index}"


def split_name(replica: str) -> tuple[str, int]:
    """The deployment and the index in a replica's name; the whole name and -1 when it has no index."""
    deployment, _, index = replica.rpartition("-")
    return (deployment, int(index)) if deployment and index.isdecimal() else (replica, -1)


def desired_replicas(snapshot: Snapshot) -> dict[str, DeploymentRecord]:
    """Every desired replica, by priority: the first replica of each deployment, then the second ones."""
    indexed = [
        (index, name, deployment)
        for name, deployment in snapshot.deployments.items()
        for index in range(deployment.replicas)
    ]
    indexed.sort(key=lambda item: item[:2])
    return {replica_name(name, index): deployment for index, name, deployment in indexed}


def frozen_replicas(snapshot: Snapshot) -> list[str]:
    """Replicas whose deployment cannot be decoded. They may be desired, so they stay as they are."""
    return [name for name in snapshot.replicas if f"deployments/{split_name(name)[0]}" in snapshot.unreadable]


def unreadable_assignments(snapshot: Snapshot) -> dict[str, int]:
    """The epoch of each replica whose assignment cannot be decoded. Its workers cannot decode it either."""
    paths = {path: path.split("/") for path in snapshot.unreadable}
    return {
        parts[1]: snapshot.unreadable[path]
        for path, parts in paths.items()
        if parts[0] == "replicas" and parts[2:] == ["assignment"]
    }
