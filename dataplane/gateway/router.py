"""Which replica takes the next attempt. Pure.

Owns: the replicas with an open stream, their last reported load, and how many choices this gateway has on
each.
Does not own: requests (`journal`), streams (`replicas`), which replicas exist (the store).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from phalanx.internal.v1 import shard_pb2
from phalanx.store.records import ShardState
from phalanx.store.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Target:
    """A replica's leader in one epoch: where a stream should be open."""

    replica: str
    epoch: int
    deployment: str
    address: str


def targets(snapshot: Snapshot, connected: Mapping[str, int]) -> dict[str, Target]:
    """The streams that should be open, by replica. `connected` has the epochs of the open ones.

    A stream opens once the leader's shard record says ready. It then stays open without that record: the
    record expires with the worker's lease when the store is away. Only a new epoch, a failure or the end of
    the replica closes the stream.
    """
    wanted = {}
    for name, assigned in snapshot.replicas.items():
        leader = snapshot.shard(name, 0)
        assignment = assigned.assignment
        is_connected = connected.get(name) == assigned.epoch
        ready = is_connected if leader is None else leader.state is ShardState.READY
        if ready and assignment.members:
            address = assignment.members[0].address
            wanted[name] = Target(name, assigned.epoch, assignment.deployment.name, address)
    return wanted


def draining(snapshot: Snapshot) -> frozenset[str]:
    """The replicas that have a draining worker."""
    leaving = {(worker.worker, worker.incarnation) for worker in snapshot.workers.values() if worker.draining}
    return frozenset(
        name
        for name, assigned in snapshot.replicas.items()
        if any((member.worker, member.incarnation) in leaving for member in assigned.assignment.members)
    )


@dataclass(slots=True)
class Route:
    """A replica with an open stream."""

    target: Target
    leader: shard_pb2.LeaderHello
    load: int = 0  # choices running and waiting, as last reported
    sent: int = 0  # choices of this gateway that are on the replica now
    picks: int = 0
    prefix_tokens: int = 0  # prompt tokens looked up in its prefix cache, as last reported
    prefix_hits: int = 0  # prompt tokens found there

    @property
    def busy(self) -> int:
        """Choices known to be on the replica. The reported load lags behind what was just sent."""
        return max(self.load, self.sent)

    def report(self, load: shard_pb2.Load) -> None:
        """Take the load that the replica's latest frame reports."""
        self.load = load.running + load.waiting
        self.prefix_tokens, self.prefix_hits = load.prefix_tokens, load.prefix_hits


class Router:
    """Picks the least loaded replica; among equals the one picked least often.

    A replica in `draining` is picked only when there is no other.
    """

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}
        self.draining: frozenset[str] = frozenset()

    @property
    def connected(self) -> dict[str, int]:
        """The epoch of every open stream, by replica."""
        return {name: route.target.epoch for name, route in self.routes.items()}

    def add(self, target: Target, leader: shard_pb2.LeaderHello) -> None:
        """A stream has opened."""
        self.routes[target.replica] = Route(target, leader)

    def remove(self, target: Target) -> None:
        """A stream has closed."""
        route = self.routes.get(target.replica)
        if route is not None and route.target.epoch == target.epoch:
            del self.routes[target.replica]

    def pick(self, deployment: str, model_hash: str, length: int) -> Route | None:
        """The best replica of a deployment that can hold `length` tokens, or None.

        `model_hash`: only replicas of exactly this model; empty admits every model.
        """
        routes = [
            route
            for route in self.routes.values()
            if route.target.deployment == deployment
            and model_hash in ("", route.leader.model_hash)
            and length <= route.leader.max_model_len
        ]

        def rank(route: Route) -> tuple[bool, int, int, str]:
            return route.target.replica in self.draining, route.busy, route.picks, route.target.replica

        return min(routes, key=rank, default=None)

    def sent(self, replica: str, choices: int) -> None:
        """An attempt was submitted."""
        route = self.routes[replica]
        route.sent += choices
        route.picks += 1

    def ended(self, replica: str, epoch: int, choices: int) -> None:
        """An attempt is over."""
        route = self.routes.get(replica)
        if route is not None and route.target.epoch == epoch:
            route.sent -= choices
