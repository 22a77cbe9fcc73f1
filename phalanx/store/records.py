"""The cluster's state: immutable records, their keys and bytes, and a snapshot of all of them.

Owns: the mapping between store keys, `phalanx.v1` state messages and records.
Does not own: decisions (`reconcile`), I/O (`etcd`, `memory`), what each record means to a person
(`protos/phalanx/v1/state.proto` documents every field).
"""

from __future__ import annotations

import enum
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from phalanx.internal.v1 import state_pb2
from phalanx.store.interface import Listing

log = logging.getLogger(__name__)
SHAPE_LIMIT = 1024  # the most replicas, and the largest tp and pp, that a deployment may have


class ShardState(enum.IntEnum):
    """What a shard is doing; the numbers are those of the protobuf enum."""

    STARTING = state_pb2.SHARD_STATE_STARTING
    READY = state_pb2.SHARD_STATE_READY
    FAILED = state_pb2.SHARD_STATE_FAILED


@dataclass(frozen=True, slots=True)
class LayoutRecord:
    """A layout of a deployment's model."""

    tp: int
    pp: int
    weights: int = 0


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """A served model and its desired shape."""

    name: str
    revision: int
    model: str
    replicas: int = 1
    tp: int = 1
    pp: int = 1
    dtype: str = ""
    max_model_len: int = 0
    created_at: float = 0.0
    load_format: str = ""
    quantization: str = ""
    fixed_layout: bool = False
    fallbacks: tuple[LayoutRecord, ...] = ()

    @property
    def shards(self) -> int:
        """Workers that one replica takes."""
        return self.tp * self.pp


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One boot of a shard server."""

    worker: str
    incarnation: str
    host: str
    address: str
    device: str
    server_pid: int
    draining: bool = False
    memory_bytes: int = 0
    ailment: str = ""


@dataclass(frozen=True, slots=True)
class GatewayRecord:
    """One boot of a gateway."""

    gateway: str
    incarnation: str
    host: str
    grpc_address: str
    http_url: str
    pid: int


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """The worker, and the boot of it, that holds a rank."""

    worker: str
    incarnation: str
    address: str


@dataclass(frozen=True, slots=True)
class AssignmentRecord:
    """Who forms a replica. Members are in rank order: rank = pp_rank * tp + tp_rank."""

    replica: str
    deployment: DeploymentRecord
    members: tuple[MemberRecord, ...]
    failures: int = 0
    formed_at: float = 0.0


@dataclass(frozen=True, slots=True)
class ReadyRecord:
    """The epoch of a replica that was ready last, and since when."""

    replica: str
    epoch: int
    ready_at: float


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What one shard of one epoch is doing."""

    replica: str
    rank: int
    epoch: int
    worker: str
    incarnation: str
    state: ShardState
    reason: str = ""
    permanent: bool = False
    engine_pid: int = 0
    text_pid: int = 0
    rendezvous: str = ""
    model_hash: str = ""
    max_model_len: int = 0
    life: int = 0


@dataclass(frozen=True, slots=True)
class LeaderRecord:
    """The controller that may write."""

    controller: str
    address: str


Record = (
    DeploymentRecord
    | LayoutRecord
    | WorkerRecord
    | GatewayRecord
    | MemberRecord
    | AssignmentRecord
    | ReadyRecord
    | ShardRecord
    | LeaderRecord
)
R = TypeVar("R", bound=Record)

_NESTED: dict[tuple[type[Any], str], type[Any]] = {
    (DeploymentRecord, "fallbacks"): LayoutRecord,
    (AssignmentRecord, "deployment"): DeploymentRecord,
    (AssignmentRecord, "members"): MemberRecord,
    (ShardRecord, "state"): ShardState,
}
_SHARD_STATES = frozenset(ShardState)


def encode(record: Record) -> bytes:
    """The record as the bytes of its `phalanx.v1` message."""
    return _to_message(record).SerializeToString(deterministic=True)  # type: ignore[no-any-return]


@functools.lru_cache(4096)  # whoever follows the cluster reads all of it on every change of one record
def decode(cls: type[R], value: bytes) -> R:
    """The record in `value`.

    A shard's state that is not known here, as one of a newer worker, is STARTING: nothing routes to it.

    Raises:
        google.protobuf.message.DecodeError: the bytes hold no such record.
        ValueError: they hold one that cannot be, such as a deployment without a shape.
    """
    record = _from_message(cls, getattr(state_pb2, cls.__name__).FromString(value))
    if isinstance(record, DeploymentRecord):
        _check_shape(record)
    elif isinstance(record, AssignmentRecord):
        _check_shape(record.deployment)
        if len(record.members) not in (0, record.deployment.shards):
            raise ValueError("an assignment has one member per rank, or none")
    return record


def _check_shape(deployment: DeploymentRecord) -> None:
    layouts = [size for layout in deployment.fallbacks for size in (layout.tp, layout.pp)]
    if not all(
        1 <= size <= SHAPE_LIMIT for size in (deployment.replicas, deployment.tp, deployment.pp, *layouts)
    ):
        raise ValueError(f"replicas, tp and pp are from 1 to {SHAPE_LIMIT}")


def _rank(text: str) -> int:
    rank = int(text)
    if rank < 0 or str(rank) != text:
        raise ValueError("a rank is a plain number")
    return rank


def _to_message(record: Any) -> Any:
    values = {}
    for name in (item.name for item in fields(record)):
        value = getattr(record, name)
        if (type(record), name) in _NESTED and not isinstance(value, int):
            value = [_to_message(item) for item in value] if isinstance(value, tuple) else _to_message(value)
        values[name] = value
    return getattr(state_pb2, type(record).__name__)(**values)


def _from_message(cls: type[R], message: Any) -> R:
    values = {}
    for name in (item.name for item in fields(cls)):
        value = getattr(message, name)
        nested = _NESTED.get((cls, name))
        if nested is ShardState:
            value = ShardState(value) if value in _SHARD_STATES else ShardState.STARTING
        elif nested is not None:
            value = (
                _from_message(nested, value)
                if hasattr(value, "DESCRIPTOR")
                else tuple(_from_message(nested, item) for item in value)
            )
        values[name] = value
    return cls(**values)


@dataclass(frozen=True, slots=True)
class Keys:
    """Where records live in the store."""

    cluster: str = "default"

    @property
    def root(self) -> str:
        """The prefix of everything."""
        return f"/phalanx/{self.cluster}/"

    def checkpoints(self, resume_key: str) -> str:
        """The prefix of a request's checkpoint. Not below `root`, which everybody watches."""
        return f"/phalanx.requests/{self.cluster}/{resume_key}/"

    def checkpoint(self, resume_key: str, gateway: str, part: int) -> str:
        """A part of a request's checkpoint, as one boot of a gateway wrote it."""
        return f"{self.checkpoints(resume_key)}{gateway}/{part:08d}"

    @property
    def leader(self) -> str:
        """The controllers' election."""
        return f"{self.root}controller/leader"

    def deployment(self, name: str) -> str:
        """A deployment."""
        return f"{self.root}deployments/{name}"

    def worker(self, worker: str) -> str:
        """A worker's registration."""
        return f"{self.root}workers/{worker}"

    def gateway(self, gateway: str) -> str:
        """A gateway's registration."""
        return f"{self.root}gateways/{gateway}"

    def assignment(self, replica: str) -> str:
        """A replica's assignment."""
        return f"{self.root}replicas/{replica}/assignment"

    def ready(self, replica: str) -> str:
        """The epoch of a replica that was ready last."""
        return f"{self.root}replicas/{replica}/ready"

    def shard(self, replica: str, rank: int) -> str:
        """A shard's status."""
        return f"{self.root}replicas/{replica}/shards/{rank}"


@dataclass(frozen=True, slots=True)
class Assigned:
    """An assignment with its epoch, which is the key's mod_revision."""

    epoch: int
    assignment: AssignmentRecord


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole cluster at one revision. Mappings are by name; shards by (replica, rank).

    `unreadable`: the mod_revision of each record that was passed over, by its key without the root.
    """

    revision: int = 0
    deployments: Mapping[str, DeploymentRecord] = field(default_factory=dict)
    workers: Mapping[str, WorkerRecord] = field(default_factory=dict)
    gateways: Mapping[str, GatewayRecord] = field(default_factory=dict)
    replicas: Mapping[str, Assigned] = field(default_factory=dict)
    shards: Mapping[tuple[str, int], ShardRecord] = field(default_factory=dict)
    leader: LeaderRecord | None = None
    ready: Mapping[str, ReadyRecord] = field(default_factory=dict)
    unreadable: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(listing: Listing, keys: Keys) -> Snapshot:
        """Read a listing of the cluster's root. Keys of other kinds are passed over.

        So are malformed records: one of them must not take down whoever reads the cluster.
        """
        deployments: dict[str, DeploymentRecord] = {}
        workers: dict[str, WorkerRecord] = {}
        gateways: dict[str, GatewayRecord] = {}
        replicas: dict[str, Assigned] = {}
        shards: dict[tuple[str, int], ShardRecord] = {}
        leader: LeaderRecord | None = None
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
                        replicas[name] = Assigned(entry.mod_revision, decode(AssignmentRecord, entry.value))
                    case ["replicas", name, "ready"]:
                        ready[name] = decode(ReadyRecord, entry.value)
                    case ["replicas", name, "shards", rank]:
                        shards[name, _rank(rank)] = decode(ShardRecord, entry.value)
                    case ["controller", "leader"]:
                        leader = decode(LeaderRecord, entry.value)
            except (ValueError, DecodeError):
                unreadable[path] = entry.mod_revision
        if unreadable:
            log.warning("unreadable records passed over", extra={"keys": sorted(unreadable)})
        return Snapshot(
            listing.revision,
            MappingProxyType(deployments),
            MappingProxyType(workers),
            MappingProxyType(gateways),
            MappingProxyType(replicas),
            MappingProxyType(shards),
            leader,
            MappingProxyType(ready),
            MappingProxyType(unreadable),
        )

    def shard(self, replica: str, rank: int) -> ShardRecord | None:
        """The status of a shard in the replica's current epoch, if its member has written one."""
        shard, assigned = self.shards.get((replica, rank)), self.replicas.get(replica)
        return shard if shard and assigned and shard.epoch == assigned.epoch else None
