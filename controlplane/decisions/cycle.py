"""The state of one reconcile cycle: facts about the cluster, and the decisions of the cycle so far.

Owns: the workers that are still free and the assignments to be written.
Does not own: the rules. They are functions of a `Cycle`, one file each.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from controlplane.decisions.actions import FormReplica
from controlplane.decisions.desired import desired_replicas, frozen_replicas, unreadable_assignments
from controlplane.decisions.health import Health, health
from controlplane.decisions.lost_workers import missing_since, suspect_since
from phalanx.store.records import DeploymentRecord, WorkerRecord
from phalanx.store.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class History:
    """The times that a cycle leaves to the next one: since when a condition holds, in Unix seconds.

    `short_since`, by replica: it has served and lacks workers. `suspect_since`, by replica: its workers
    vanished together with most others. `missing_since`, by worker: it is assigned and not registered.
    """

    short_since: Mapping[str, float] = field(default_factory=dict)
    suspect_since: Mapping[str, float] = field(default_factory=dict)
    missing_since: Mapping[str, float] = field(default_factory=dict)


class Need(enum.Enum):
    """What a desired replica needs."""

    KEEP = enum.auto()  # as desired, not failed
    WAIT = enum.auto()  # failed, and its retry is not due
    FORM = enum.auto()  # missing or failed
    RESHAPE = enum.auto()  # of an outdated shape, or degraded; it may be serving


@dataclass(slots=True)
class Cycle:
    """One cycle at `now`, in seconds since the Unix epoch. `assess` fills `needs`, `retries` and `free`.

    `epochs`: the epoch of every replica that has an assignment, readable or not. `wakes`: times at which a
    decision may change although the cluster does not.
    """

    snapshot: Snapshot
    now: float
    history: History
    desired: dict[str, DeploymentRecord] = field(init=False)
    health: dict[str, Health] = field(init=False)
    missing_since: dict[str, float] = field(init=False)
    suspect_since: dict[str, float] = field(init=False)
    epochs: dict[str, int] = field(init=False)
    frozen: list[str] = field(init=False)
    needs: dict[str, Need] = field(default_factory=dict)
    free: dict[str, WorkerRecord] = field(default_factory=dict)
    formed: dict[str, FormReplica] = field(default_factory=dict)
    shortages: dict[str, str] = field(default_factory=dict)
    retries: dict[str, float] = field(default_factory=dict)
    wakes: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        snapshot = self.snapshot
        self.desired = desired_replicas(snapshot)
        self.health = {replica: health(snapshot, replica) for replica in snapshot.replicas}
        self.missing_since = missing_since(snapshot, self.history.missing_since, self.now)
        self.suspect_since = suspect_since(snapshot, self.missing_since, self.history.suspect_since, self.now)
        self.epochs = {replica: current.epoch for replica, current in snapshot.replicas.items()}
        self.epochs |= unreadable_assignments(snapshot)
        self.frozen = frozen_replicas(snapshot)

    def members(self, replica: str) -> list[str]:
        """The workers of the replica's current epoch, in rank order; empty when it has no assignment."""
        current = self.snapshot.replicas.get(replica)
        return [member.worker for member in current.assignment.members] if current else []
