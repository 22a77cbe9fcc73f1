"""How a replica's current epoch is doing: forming, ready or failed, and why. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from phalanx.store.records import AssignmentRecord, ShardState
from phalanx.store.snapshot import Snapshot


class ReplicaState(enum.Enum):
    """State of one epoch of a replica."""

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


def health(snapshot: Snapshot, replica: str) -> Health:
    """The health of a replica that has an assignment."""
    assignment = snapshot.replicas[replica].assignment
    if not assignment.members:
        return Health(ReplicaState.FAILED, "its assignment names no worker")
    lost = lost_members(snapshot, assignment)
    if lost:
        return Health(ReplicaState.FAILED, f"lost worker{'s' * (len(lost) > 1)} {', '.join(lost)}")
    shards = [snapshot.shard(replica, rank) for rank in range(len(assignment.members))]
    failed = [shard for shard in shards if shard and shard.state is ShardState.FAILED]
    if failed:
        # A shard that fails because of a peer quotes the peer's reason: the shortest reason is the first one.
        first = min(failed, key=lambda shard: (not shard.permanent, len(shard.reason), shard.rank))
        return Health(ReplicaState.FAILED, f"shard {first.rank}: {first.reason}", first.permanent)
    if all(shard and shard.state is ShardState.READY for shard in shards):
        return Health(ReplicaState.READY)
    return Health(ReplicaState.FORMING)


def lost_members(snapshot: Snapshot, assignment: AssignmentRecord) -> list[str]:
    """Members that are not registered, or that are registered as another incarnation."""
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
