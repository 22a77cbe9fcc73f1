"""What the cluster's state says to one boot of a worker."""

from __future__ import annotations

from dataplane.shard.events import Assigned, Event, PeerFailed, RendezvousSeen, Unassigned
from phalanx.store.records import ShardState
from phalanx.store.snapshot import Snapshot


def observe(snapshot: Snapshot, worker: str, incarnation: str) -> list[Event]:
    """The events that the supervisor should hear; it passes over those that it knows.

    A worker in two assignments, as it may be for a moment while it moves, holds the newer.
    """
    places = [
        (assigned, rank)
        for assigned in snapshot.replicas.values()
        for rank, member in enumerate(assigned.assignment.members)
        if (member.worker, member.incarnation) == (worker, incarnation)
    ]
    if not places:
        return [Unassigned()]
    assigned, rank = max(places, key=lambda place: place[0].epoch)
    replica, deployment = assigned.assignment.replica, assigned.assignment.deployment
    events: list[Event] = [
        Assigned(
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
