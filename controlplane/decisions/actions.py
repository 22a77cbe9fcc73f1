"""The actions that a decision may ask for. `controlplane.fencing` writes them to the store."""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.store.records import AssignmentRecord, ReadyRecord


@dataclass(frozen=True, slots=True)
class FormReplica:
    """Begin the replica's next epoch: write an assignment over the one of `epoch` (0: there is none)."""

    assignment: AssignmentRecord
    epoch: int


@dataclass(frozen=True, slots=True)
class RemoveReplica:
    """Delete the assignment of `epoch`."""

    replica: str
    epoch: int


@dataclass(frozen=True, slots=True)
class MarkReady:
    """Record that an epoch has become ready."""

    ready: ReadyRecord


@dataclass(frozen=True, slots=True)
class ForgetReady:
    """Delete the record that a replica has been ready; the replica is no longer desired."""

    replica: str


@dataclass(frozen=True, slots=True)
class PruneShard:
    """Delete the status of a shard that belongs to no replica."""

    replica: str
    rank: int


Action = FormReplica | RemoveReplica | MarkReady | ForgetReady | PruneShard
