"""What a worker's supervisor hears and what it answers: plain values."""

from __future__ import annotations

from dataclasses import dataclass

from engine.ipc.wire import EngineReady, Message, StartEngine, StartText
from phalanx.store.records import ShardRecord

# Events


@dataclass(frozen=True, slots=True)
class Assigned:
    """This boot of the worker holds `rank` of a replica in `epoch`.

    `life` counts how often the leader has formed the replica anew since; `addresses` are those of the ranks.
    """

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
    addresses: tuple[str, ...] = ()
    life: int = 0

    @property
    def era(self) -> tuple[int, int]:
        """Epoch and life: it only grows."""
        return self.epoch, self.life


@dataclass(frozen=True, slots=True)
class Unassigned:
    """This boot of the worker holds nothing."""


@dataclass(frozen=True, slots=True)
class RendezvousSeen:
    """Rank 0 of this replica, epoch and life says where the group meets."""

    epoch: int
    address: str
    life: int = 0


@dataclass(frozen=True, slots=True)
class PeerFailed:
    """Another shard of this replica, epoch and life has failed: the whole group has."""

    epoch: int
    rank: int
    reason: str
    permanent: bool
    life: int = 0


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The replica that this worker leads has failed in this life, and nobody else forms it anew."""

    epoch: int
    life: int


@dataclass(frozen=True, slots=True)
class Formed:
    """The leader of this worker's replica forms it anew and says where the group meets."""

    replica: str
    epoch: int
    life: int
    rendezvous: str


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
class Hung:
    """A child that lives does nothing any more. `status` completes a sentence, as that of `Exited`."""

    child: int
    status: str


@dataclass(frozen=True, slots=True)
class StoodStill:
    """This process has not run for so long that its place may be another's by now."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stop:
    """The worker is shutting down."""


Event = (
    Assigned
    | Unassigned
    | RendezvousSeen
    | PeerFailed
    | Abandoned
    | Formed
    | Spawned
    | Received
    | Exited
    | Hung
    | StoodStill
    | Stop
)

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
class Form:
    """Ask the worker at an address for its engine, which is `rank` of a life of the replica."""

    address: str
    rank: int
    replica: str
    epoch: int
    life: int
    rendezvous: str


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


Instruction = (
    SpawnEngine | SpawnText | Kill | SendRendezvous | Form | Publish | Withdraw | BeginServing | EndServing
)
