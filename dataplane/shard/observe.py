"""The cluster's state as events for one incarnation of a worker."""

from __future__ import annotations

from dataplane.shard.events import Event, PeerFailed, RankAssigned, RankUnassigned, RendezvousSeen
from phalanx.store.records import ShardState
from phalanx.store.snapshot import Snapshot


def observe(snapshot: Snapshot, worker: str, incarnation: str) -> list[Event]:
    """The events for the supervisor, which ignores those that it knows.

    A worker that moves is in two assignments for a moment; it holds the rank of the newer one.
    """
    places = [
        (assigned, rank)
        for assigned in snapshot.replicas.values()
        for rank, member in enumerate(assigned.assignment.members)
        if (member.worker, member.incarnation) == (worker, incarnation)
    ]
    if not places:
        return [RankUnassigned()]
    assigned, rank = max(places, key=lambda place: place[0].epoch)
    replica, deployment = assigned.assignment.replica, assigned.assignment.deployment
    events: list[Event] = [
        RankAssigned(
            replica=replica,
            rank=rank,
            epoch=assigned.epoch,
            model=deployment.model,
            tp=deployment.tp,
            pp=deployment.pp,
            dtype=deployment.dtype,
            max_model_len=deployment.max_model_len,
            load_format=deployment.load_format,
            quantization=deployment.quantization,
            addresses=tuple(member.address for member in assigned.assignment.members),
        )
    ]
    for other in range(len(assigned.assignment.members)):
        shard = snapshot.shard(replica, other)
        if other == rank or shard is None:
            continue
        if other == 0 and shard.rendezvous:
            events.append(RendezvousSeen(assigned.epoch, shard.rendezvous, shard.life))
        if shard.state is ShardState.FAILED:
            events.append(PeerFailed(assigned.epoch, other, shard.reason, shard.permanent, shard.life))
    return events
