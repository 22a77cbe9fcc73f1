"""The whole cluster as records, read from one listing of the store."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from google.protobuf.message import DecodeError

from phalanx.store.interface import Listing
from phalanx.store.keys import Keys
from phalanx.store.records import (
    AssignmentRecord,
    ControllerRecord,
    DeploymentRecord,
    GatewayRecord,
    ReadyRecord,
    ShardRecord,
    WorkerRecord,
    decode,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaEpoch:
    """A replica's assignment with its epoch, which is the mod_revision of the assignment's key."""

    epoch: int
    assignment: AssignmentRecord


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole cluster at one revision. Mappings are by name; shards are by (replica, rank).

    `unreadable`: by key without the root, the mod_revision of each record that cannot be decoded.
    """

    revision: int = 0
    deployments: Mapping[str, DeploymentRecord] = field(default_factory=dict)
    workers: Mapping[str, WorkerRecord] = field(default_factory=dict)
    gateways: Mapping[str, GatewayRecord] = field(default_factory=dict)
    replicas: Mapping[str, ReplicaEpoch] = field(default_factory=dict)
    shards: Mapping[tuple[str, int], ShardRecord] = field(default_factory=dict)
    active_controller: ControllerRecord | None = None
    ready: Mapping[str, ReadyRecord] = field(default_factory=dict)
    unreadable: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(listing: Listing, keys: Keys) -> Snapshot:
        """Read a listing of the cluster's root. Keys of unknown kinds are ignored.

        A malformed record goes to `unreadable` instead of raising: one bad value must not stop every
        process that watches the cluster.
        """
        deployments: dict[str, DeploymentRecord] = {}
        workers: dict[str, WorkerRecord] = {}
        gateways: dict[str, GatewayRecord] = {}
        replicas: dict[str, ReplicaEpoch] = {}
        shards: dict[tuple[str, int], ShardRecord] = {}
        active_controller: ControllerRecord | None = None
        ready: dict[str, ReadyRecord] = {}
        unreadable: dict[str, int] = {}
        for key, entry in listing.entries.items():
            path = key.removeprefix(keys.root)
            try:
                match path.split("/"):
                    case ["deployments", name]:
                        deployments[name] = decode(DeploymentRecord, entry.value)
                    case ["workers", name]:
                        workers[name] = decode(WorkerRecord, entry.value)
                    case ["gateways", name]:
                        gateways[name] = decode(GatewayRecord, entry.value)
                    case ["replicas", name, "assignment"]:
                        assignment = decode(AssignmentRecord, entry.value)
                        replicas[name] = ReplicaEpoch(entry.mod_revision, assignment)
                    case ["replicas", name, "ready"]:
                        ready[name] = decode(ReadyRecord, entry.value)
                    case ["replicas", name, "shards", rank]:
                        shards[name, _rank(rank)] = decode(ShardRecord, entry.value)
                    case ["controller", "leader"]:
                        active_controller = decode(ControllerRecord, entry.value)
            except (ValueError, DecodeError):
                unreadable[path] = entry.mod_revision
        if unreadable:
            log.warning("unreadable records ignored", extra={"keys": sorted(unreadable)})
        return Snapshot(
            listing.revision,
            MappingProxyType(deployments),
            MappingProxyType(workers),
            MappingProxyType(gateways),
            MappingProxyType(replicas),
            MappingProxyType(shards),
            active_controller,
            MappingProxyType(ready),
            MappingProxyType(unreadable),
        )

    def shard(self, replica: str, rank: int) -> ShardRecord | None:
        """The status of a shard in the replica's current epoch; None until its worker has written one."""
        shard, current = self.shards.get((replica, rank)), self.replicas.get(replica)
        return shard if shard and current and shard.epoch == current.epoch else None


def _rank(text: str) -> int:
    rank = int(text)
    if rank < 0 or str(rank) != text:
        raise ValueError("a rank is a non-negative number without sign or leading zeros")
    return rank
