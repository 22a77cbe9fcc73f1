"""What a snapshot says about each replica: wanted or not, ready or failed, and why. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from phalanx.store.records import AssignmentRecord, DeploymentRecord, ShardState
from phalanx.store.snapshot import Snapshot


class ReplicaState(enum.Enum):
    """How one epoch of a replica is doing."""

    FORMING = "forming"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Health:
    """A replica's state, and the reason of a failure for people.

    `permanent`: the same model and layout will fail again.
    """

    state: ReplicaState
    reason: str = ""
    permanent: bool = False


def replica_name(deployment: str, index: int) -> str:
    """The name of a deployment's replica. Distinct for distinct arguments."""
    return f"{deployment}-{index}"


def split_name(replica: str) -> tuple[str, int]:
    """The deployment and the index in a replica's name; the whole name and -1 where it has no index."""
    deployment, _, index = replica.rpartition("-")
    return (deployment, int(index)) if deployment and index.isdecimal() else (replica, -1)


def wanted(snapshot: Snapshot) -> dict[str, DeploymentRecord]:
    """The replicas that should exist: every deployment's first before anyone's second."""
    indexed = [
        (index, name, deployment)
        for name, deployment in snapshot.deployments.items()
        for index in range(deployment.replicas)
    ]
    indexed.sort(key=lambda item: item[:2])
    return {replica_name(name, index): deployment for index, name, deployment in indexed}


def on_hold(snapshot: Snapshot) -> list[str]:
    """Replicas whose deployment is there and cannot be read: nobody can say that they are not wanted."""
    return [name for name in snapshot.replicas if f"deployments/{split_name(name)[0]}" in snapshot.unreadable]


def unreadable(snapshot: Snapshot) -> dict[str, int]:
    """The epochs of the replicas whose assignment cannot be read, not even by their workers."""
    paths = {path: path.split("/") for path in snapshot.unreadable}
    return {
        parts[1]: snapshot.unreadable[path]
        for path, parts in paths.items()
        if parts[0] == "replicas" and parts[2:] == ["assignment"]
    }


def same_shape(one: DeploymentRecord, other: DeploymentRecord) -> bool:
    """Whether a replica formed for one revision serves the other: only what does not shape it may differ."""
    return (
        replace(
            other,
            replicas=one.replicas,
            revision=one.revision,
            created_at=one.created_at,
            fixed_layout=one.fixed_layout,
            fallbacks=one.fallbacks,
        )
        == one
    )


def fallbacks(deployment: DeploymentRecord) -> list[DeploymentRecord]:
    """The deployment in each of the smaller layouts that its replicas may run in, the best first."""
    return [replace(deployment, tp=layout.tp, pp=layout.pp) for layout in deployment.fallbacks]


def is_degraded(runs: DeploymentRecord, wanted: DeploymentRecord) -> bool:
    """Whether a replica is of the revision that is wanted, in a smaller layout."""
    return runs.revision == wanted.revision and any(same_shape(runs, one) for one in fallbacks(wanted))


def health(snapshot: Snapshot, replica: str) -> Health:
    """How the current epoch of a replica that has an assignment is doing."""
    assignment = snapshot.replicas[replica].assignment
    if not assignment.members:
        return Health(ReplicaState.FAILED, "its assignment names no worker")
    lost = lost_members(snapshot, assignment)
    if lost:
        return Health(ReplicaState.FAILED, f"lost worker{'s' * (len(lost) > 1)} {', '.join(lost)}")
    shards = [snapshot.shard(replica, rank) for rank in range(len(assignment.members))]
    failed = [shard for shard in shards if shard and shard.state is ShardState.FAILED]
    if failed:
        # Peers repeat the reason of the one that failed first inside their own.
        first = min(failed, key=lambda shard: (not shard.permanent, len(shard.reason), shard.rank))
        return Health(ReplicaState.FAILED, f"shard {first.rank}: {first.reason}", first.permanent)
    if all(shard and shard.state is ShardState.READY for shard in shards):
        return Health(ReplicaState.READY)
    return Health(ReplicaState.FORMING)


def lost_members(snapshot: Snapshot, assignment: AssignmentRecord) -> list[str]:
    """Members that are gone, or that have booted again since the replica was formed."""
    return [
        member.worker
        for member in assignment.members
        if member.worker not in snapshot.workers
        or snapshot.workers[member.worker].incarnation != member.incarnation
    ]


def was_ready(snapshot: Snapshot, replica: str) -> bool:
    """Whether the replica's current epoch has ever been ready."""
    ready = snapshot.ready.get(replica)
    return ready is not None and ready.epoch == snapshot.replicas[replica].epoch
