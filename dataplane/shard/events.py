"""Events for a worker's supervisor, and the instructions that it answers with: plain values."""

from __future__ import annotations

from dataclasses import dataclass

from engine.ipc.wire import EngineReady, Message, StartEngine, StartText
from phalanx.store.records import ShardRecord

# Events


@dataclass(frozen=True, slots=True)
class RankAssigned:
    """This incarnation of the worker holds `rank` of a replica in `epoch`.

    `life` counts how often the leader has started the replica again within the epoch. `addresses` are those
    of the ranks' workers, host:port.
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
    def epoch_and_life(self) -> tuple[int, int]:
        """Epoch and life. The pair only grows."""
        return self.epoch, self.life


@dataclass(frozen=True, slots=True)
class RankUnassigned:
    """This incarnation of the worker holds no rank."""


@dataclass(frozen=True, slots=True)
class RendezvousSeen:
    """Rank 0 of this replica, epoch and life has published where the group meets."""

    epoch: int
    address: str
    life: int = 0


@dataclass(frozen=True, slots=True)
class PeerFailed:
    """Another shard of this replica, epoch and life has failed, and so has the whole group."""

    epoch: int
    rank: int
    reason: str
    permanent: bool
    life: int = 0


@dataclass(frozen=True, slots=True)
class ControllerTimedOut:
    """The replica that this worker leads has failed in this life, and no controller has acted in time."""

    epoch: int
    life: int


@dataclass(frozen=True, slots=True)
class LeaderStartedLife:
    """The leader of this worker's replica has started the next life and asks for this rank."""

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
    """A child has sent a message."""

    child: int
    message: Message


@dataclass(frozen=True, slots=True)
class Exited:
    """A child has ended. `status` completes a sentence: "was killed by SIGKILL"."""

    child: int
    status: str


@dataclass(frozen=True, slots=True)
class Hung:
    """A child runs but makes no progress. `status` completes a sentence, as that of `Exited`."""

    child: int
    status: str


@dataclass(frozen=True, slots=True)
class WorkerPaused:
    """This process has not run for longer than its lease lives: another worker may hold its rank by now."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stop:
    """The worker is shutting down."""


Event = (
    RankAssigned
    | RankUnassigned
    | RendezvousSeen
    | PeerFailed
    | ControllerTimedOut
    | LeaderStartedLife
    | Spawned
    | Received
    | Exited
    | Hung
    | WorkerPaused
    | Stop
)

# Instructions


@dataclass(frozen=True, slots=True)
class SpawnEngine:
    """Start an engine process as `child`. `text` is the child that rank 0 sends its steps to, else None."""

    child: int
    start: StartEngine
    text: int | None = None


@dataclass(frozen=True, slots=True)
class SpawnText:
    """Start a text process as `child`."""

    child: int
    start: StartText


@dataclass(frozen=True, slots=True)
class Kill:
    """End a child by SIGKILL: an engine that hangs in a collective does not react to anything else."""

    child: int


@dataclass(frozen=True, slots=True)
class SendRendezvous:
    """Tell the engine where its group meets."""

    child: int
    address: str


@dataclass(frozen=True, slots=True)
class AskPeerToStart:
    """Ask the worker at `address` to start its engine, which is `rank` of the replica, in this life."""

    address: str
    rank: int
    replica: str
    epoch: int
    life: int
    rendezvous: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Write this status of the shard to the store, in place of any that is not yet written."""

    record: ShardRecord


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Remove the shard's status from the store."""


@dataclass(frozen=True, slots=True)
class BeginServing:
    """Serve gateways as the leader of this epoch, with these two children.

    `longest_token_bytes` is that of `TextReady`.
    """

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
    SpawnEngine
    | SpawnText
    | Kill
    | SendRendezvous
    | AskPeerToStart
    | Publish
    | Withdraw
    | BeginServing
    | EndServing
)
