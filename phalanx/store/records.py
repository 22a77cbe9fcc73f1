"""The values that the store holds, as immutable records, and their bytes.

Owns: the conversion between records and `phalanx.internal.v1` state messages, and the checks of a record.
Does not own: keys (`keys`), the whole cluster (`snapshot`), the meaning of each field
(`protos/phalanx/internal/v1/state.proto` documents all of them).
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from phalanx.internal.v1 import state_pb2

SHAPE_LIMIT = 1024  # upper bound of a deployment's replicas, tp and pp


class ShardState(enum.IntEnum):
    """What a shard is doing; the numbers are those of the protobuf enum."""

    STARTING = state_pb2.SHARD_STATE_STARTING
    READY = state_pb2.SHARD_STATE_READY
    FAILED = state_pb2.SHARD_STATE_FAILED


@dataclass(frozen=True, slots=True)
class LayoutRecord:
    """One TP x PP layout. `weights`: weight elements on the rank that has the most; 0 means unknown."""

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
        """Workers, one per rank, that one replica needs."""
        return self.tp * self.pp


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One incarnation of a worker."""

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
    """One incarnation of a gateway."""

    gateway: str
    incarnation: str
    host: str
    grpc_address: str
    http_url: str
    pid: int


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """The worker of one rank, and its incarnation."""

    worker: str
    incarnation: str
    address: str


@dataclass(frozen=True, slots=True)
class AssignmentRecord:
    """The workers that form a replica, in rank order: rank = pp_rank * tp + tp_rank."""

    replica: str
    deployment: DeploymentRecord
    members: tuple[MemberRecord, ...]
    failures: int = 0
    formed_at: float = 0.0


@dataclass(frozen=True, slots=True)
class ReadyRecord:
    """The last epoch of a replica that became ready, and when it did."""

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
class ControllerRecord:
    """The active controller: the one that holds the lock."""

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
    | ControllerRecord
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
    """The record as the bytes of its protobuf message."""
    return _to_message(record).SerializeToString(deterministic=True)  # type: ignore[no-any-return]


@functools.lru_cache(4096)  # a change of one record makes a new snapshot, which decodes every record
def decode(cls: type[R], value: bytes) -> R:
    """The record in `value`.

    A shard state that this version does not know, written by a newer worker, reads as STARTING, so
    that no gateway routes to the shard.

    Raises:
        google.protobuf.message.DecodeError: the bytes are not such a message.
        ValueError: the message breaks a rule, for example a deployment without a shape.
    """
    record = _from_message(cls, getattr(state_pb2, cls.__name__).FromString(value))
    if isinstance(record, DeploymentRecord):
        _check_shape(record)
    elif isinstance(record, AssignmentRecord):
        _check_shape(record.deployment)
        if len(record.members) not in (0, record.deployment.shards):
            raise ValueError("an assignment has one member per rank, or no member")
    return record


def _check_shape(deployment: DeploymentRecord) -> None:
    layouts = [size for layout in deployment.fallbacks for size in (layout.tp, layout.pp)]
    if not all(
        1 <= size <= SHAPE_LIMIT for size in (deployment.replicas, deployment.tp, deployment.pp, *layouts)
    ):
        raise ValueError(f"replicas, tp and pp must be from 1 to {SHAPE_LIMIT}")


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
