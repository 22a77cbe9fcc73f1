"""What a worker's supervisor hears and what it answers: plain values."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.state import ShardRecord
from engine.wire import EngineReady, Message, StartEngine, StartText

# Events


@dataclass(frozen=True, slots=True)
class Assigned:
    """This boot of the worker holds `rank` of a replica in `epoch`."""

    replica: str
    rank: int
    epoch: int
    model: str
    tp: int
    pp: int
    dtype: str = ""
    max_model_len: int = 0
    load_format: str = ""
    quantization: str = ""


@dataclass(frozen=True, slots=True)
class Unassigned:
    """This boot of the worker holds nothing."""


@dataclass(frozen=True, slots=True)
class RendezvousSeen:
    """Rank 0 of this replica and epoch says where the group meets."""

    epoch: int
    address: str


@dataclass(frozen=True, slots=True)
class PeerFailed:
    """Another shard of this replica and epoch has failed: the whole group has."""

    epoch: int
    rank: int
    reason: str
    permanent: bool


@dataclass(frozen=True, slots=True)
class Spawned:
    """A child runs."""

    child: int
    pid: int


@dataclass(frozen=True, slots=True)
class Received:
    """A child said something."""

    child: int
    message: Message


@dataclass(frozen=True, slots=True)
class Exited:
    """A child is gone. `status` completes a sentence: "was killed by SIGKILL"."""

    child: int
    status: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The worker is shutting down."""


Event = Assigned | Unassigned | RendezvousSeen | PeerFailed | Spawned | Received | Exited | Stop

# Instructions


@dataclass(frozen=True, slots=True)
class SpawnEngine:
    """Start an engine process as `child`."""

    child: int
    start: StartEngine


@dataclass(frozen=True, slots=True)
class SpawnText:
    """Start a text process as `child`."""

    child: int
    start: StartText


@dataclass(frozen=True, slots=True)
class Kill:
    """End a child by SIGKILL: after a fault an engine hangs in a collective and hears nothing else."""

    child: int


@dataclass(frozen=True, slots=True)
class SendRendezvous:
    """Tell the engine where its group meets."""

    child: int
    address: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Make this the shard's status in the store; replaces what is not yet written."""

    record: ShardRecord


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Remove the shard's status from the store."""


@dataclass(frozen=True, slots=True)
class BeginServing:
    """Serve gateways as the leader of this epoch. `longest_token_bytes` is that of `TextReady`."""

    replica: str
    epoch: int
    engine: int
    text: int
    ready: EngineReady
    longest_token_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EndServing:
    """End every gateway's stream of this epoch at once."""

    epoch: int
    reason: str


Instruction = SpawnEngine | SpawnText | Kill | SendRendezvous | Publish | Withdraw | BeginServing | EndServing
