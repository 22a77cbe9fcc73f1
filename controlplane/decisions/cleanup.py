"""Decides which records to delete, and marks epochs that became ready. Pure."""

from __future__ import annotations

from controlplane.decisions.actions import ForgetReady, MarkReady, PruneShard
from controlplane.decisions.cycle import Cycle, Need
from controlplane.decisions.desired import split_name
from controlplane.decisions.health import ReplicaState, was_ready
from phalanx.store.records import ReadyRecord


def removed_replicas(cycle: Cycle) -> list[str]:
    """Undesired replicas, highest index first, then failed ones whose workers others took in this cycle."""
    undesired = [name for name in cycle.epochs if name not in cycle.desired and name not in cycle.frozen]
    undesired.sort(key=lambda name: (split_name(name)[0], -split_name(name)[1]))
    taken = {member.worker for form in cycle.formed.values() for member in form.assignment.members}
    displaced = [
        replica
        for replica in cycle.shortages
        if replica in cycle.snapshot.replicas
        and cycle.needs[replica] is Need.FORM
        and taken.intersection(cycle.members(replica))
    ]
    return undesired + displaced


def ready_marks(cycle: Cycle) -> list[MarkReady]:
    """A mark for each epoch that has become ready and is not marked yet."""
    return [
        MarkReady(ReadyRecord(replica, cycle.snapshot.replicas[replica].epoch, cycle.now))
        for replica in cycle.desired
        if replica in cycle.snapshot.replicas
        and replica not in cycle.formed
        and cycle.health[replica].state is ReplicaState.READY
        and not was_ready(cycle.snapshot, replica)
    ]


def stale_shards(cycle: Cycle, removed: list[str]) -> list[PruneShard]:
    """The shard statuses of replicas that are gone or have fewer ranks now."""
    num_ranks = {
        replica: len(cycle.members(replica)) for replica in cycle.snapshot.replicas if replica not in removed
    }
    num_ranks |= {replica: len(form.assignment.members) for replica, form in cycle.formed.items()}
    return [
        PruneShard(replica, rank)
        for replica, rank in sorted(cycle.snapshot.shards)
        if rank >= num_ranks.get(replica, 0)
    ]


def stale_ready_records(cycle: Cycle, removed: list[str]) -> list[ForgetReady]:
    """Ready records of replicas that are not desired and have no assignment after this cycle."""
    return [
        ForgetReady(replica)
        for replica in sorted(cycle.snapshot.ready)
        if replica not in cycle.desired and (replica not in cycle.epochs or replica in removed)
    ]
