"""The life of a worker's children, epoch by epoch, as a pure state machine.

Events in, instructions out: no sockets, no processes, no clock. `dataplane.shard.worker` carries out
the instructions, in order.

Owns: which children should live, what this shard's status is, when the leader serves.
Does not own: processes (`children`), the store (`phalanx.store.registration`), requests (`requests`).

A child's number is never used again, so the messages, steps and death of a child of an earlier epoch cannot
be mistaken for those of the current one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dataplane.shard.events import (
    AskPeerToStart,
    BeginServing,
    ControllerTimedOut,
    EndServing,
    Event,
    Exited,
    Hung,
    Instruction,
    Kill,
    LeaderStartedLife,
    PeerFailed,
    Publish,
    RankAssigned,
    RankUnassigned,
    Received,
    RendezvousSeen,
    SendRendezvous,
    Spawned,
    SpawnEngine,
    SpawnText,
    Stop,
    Withdraw,
    WorkerPaused,
)
from engine.config import EngineConfig
from engine.ipc.wire import EngineFailed, EngineReady, Message, Rendezvous, StartEngine, StartText, TextReady
from phalanx.store.records import ShardRecord, ShardState

LIFE_BITS = 16  # the low bits of the number by which an engine knows its epoch and life
MAX_REASON = 1000  # characters: a reason travels in the store and in gRPC trailers


@dataclass(slots=True)
class _Child:
    id: int
    pid: int = 0
    ready: bool = False
    longest_token_bytes: int = 0  # of a text process


class ShardSupervisor:
    """The state machine of one worker incarnation and its shard: one rank of one replica at a time."""

    def __init__(self, worker: str, incarnation: str, host: str, device: str) -> None:
        self._worker, self._incarnation = worker, incarnation
        self._host, self._device = host, device
        self._children = 0
        self._assignment: RankAssigned | None = None
        self._record: ShardRecord | None = None
        self._engine: _Child | None = None
        self._limits: EngineReady | None = None
        self._rendezvous_sent = False
        self._text: _Child | None = None
        self._text_start: StartText | None = None
        self._serving = False
        self._stopped = False

    @property
    def record(self) -> ShardRecord | None:
        """The status last published; None when the worker has no rank."""
        return self._record

    @property
    def leader_address(self) -> str:
        """host:port of the leader of this worker's replica, empty where this worker has no rank."""
        return self._assignment.addresses[0] if self._assignment and self._assignment.addresses else ""

    def handle(self, event: Event) -> list[Instruction]:
        """Everything to do about one event, in order."""
        if self._stopped:
            return []
        match event:
            case RankAssigned():
                return self._start(event)
            case RankUnassigned():
                return self._unassigned()
            case RendezvousSeen():
                return self._rendezvous_seen(event)
            case PeerFailed(epoch, rank, reason, permanent, life):
                if self._assignment is None or self._assignment.epoch_and_life != (epoch, life):
                    return []
                return self._fail(f"shard {rank} failed: {reason}", permanent)
            case ControllerTimedOut(epoch, life):
                return self._controller_timed_out(epoch, life)
            case LeaderStartedLife():
                return self._leader_started_life(event)
            case Spawned(child, pid):
                return self._spawned(child, pid)
            case Received(child, message):
                return self._received(child, message)
            case Exited(child, status):
                return self._exited(child, status)
            case Hung(child, status):
                return self._hung(child, status)
            case WorkerPaused(seconds):
                # The replica may be elsewhere by now: nothing that this rank still sends may look current.
                return self._fail(f"the worker was paused for {seconds:.1f} s", permanent=False)
            case Stop():
                return self._stop()

    def check_integrity(self) -> None:
        """Assert the invariants that hold between any two events."""
        failed = self._record is not None and self._record.state is ShardState.FAILED
        ready = self._record is not None and self._record.state is ShardState.READY
        assert (self._assignment is None) == (self._record is None), "a rank has a status"
        assert not (self._engine and failed), "a failed shard has no engine"
        assert not (ready and not (self._engine and self._engine.ready)), "ready with a dead engine"
        assert not (self._serving and not (ready and self._text and self._text.ready)), "serving unready"
        assert not (self._engine or self._text) or self._assignment, "children without a rank"

    def _start(self, assignment: RankAssigned) -> list[Instruction]:
        """Start this rank in a new epoch or life, in place of whatever ran before."""
        past = self._assignment
        if (
            past is not None
            and assignment.replica == past.replica
            and assignment.epoch_and_life <= past.epoch_and_life
        ):
            return []
        todo = self._end("the replica is formed anew") + self._kill_engine()
        if past is not None and (past.replica, past.rank) != (assignment.replica, assignment.rank):
            todo.append(Withdraw())
        text = StartText(assignment.model, ids_only=assignment.load_format == "dummy")
        if assignment.rank != 0 or text != self._text_start:
            todo += self._kill_text()
        self._assignment = assignment
        self._limits, self._rendezvous_sent = None, False
        self._engine = _Child(self._number())
        config = EngineConfig(
            model=assignment.model,
            tp=assignment.tp,
            pp=assignment.pp,
            rank=assignment.rank,
            epoch=assignment.epoch << LIFE_BITS | assignment.life,
            host=self._host,
            device=self._device,
            dtype=assignment.dtype,
            max_model_len=assignment.max_model_len,
            load_format=assignment.load_format or "auto",
            quantization=assignment.quantization,
        )
        if assignment.rank == 0 and self._text is None:
            self._text, self._text_start = _Child(self._number()), text
            todo.append(SpawnText(self._text.id, text))
        todo.append(SpawnEngine(self._engine.id, StartEngine(config), self._text.id if self._text else None))
        self._record = ShardRecord(
            replica=assignment.replica,
            rank=assignment.rank,
            epoch=assignment.epoch,
            worker=self._worker,
            incarnation=self._incarnation,
            state=ShardState.STARTING,
            text_pid=self._text.pid if self._text else 0,
            life=assignment.life,
        )
        return [*todo, Publish(self._record)]

    def _controller_timed_out(self, epoch: int, life: int) -> list[Instruction]:
        """Start the replica's next life. The other ranks are asked once this engine says where to meet."""
        assignment, record = self._assignment, self._record
        if (
            assignment is None
            or record is None
            or assignment.epoch_and_life != (epoch, life)
            or assignment.rank != 0
        ):
            return []
        if record.state is not ShardState.FAILED or record.permanent:
            return []
        return self._start(replace(assignment, life=life + 1))

    def _leader_started_life(self, event: LeaderStartedLife) -> list[Instruction]:
        assignment = self._assignment
        if (
            assignment is None
            or (assignment.replica, assignment.epoch) != (event.replica, event.epoch)
            or assignment.rank == 0
        ):
            return []
        todo = self._start(replace(assignment, life=event.life))
        return todo + self._rendezvous_seen(RendezvousSeen(event.epoch, event.rendezvous, event.life))

    def _unassigned(self) -> list[Instruction]:
        if self._assignment is None:
            return []
        todo = self._end("the replica is gone") + self._kill_engine() + self._kill_text()
        self._assignment = self._record = None
        return [*todo, Withdraw()]

    def _stop(self) -> list[Instruction]:
        todo = self._end("the worker is shutting down") + self._kill_engine() + self._kill_text()
        self._assignment = self._record = None
        self._stopped = True
        return todo

    def _rendezvous_seen(self, event: RendezvousSeen) -> list[Instruction]:
        assignment, engine = self._assignment, self._engine
        if assignment is None or engine is None or self._rendezvous_sent:
            return []
        if assignment.epoch_and_life != (event.epoch, event.life) or assignment.rank == 0:
            return []
        self._rendezvous_sent = True
        return [SendRendezvous(engine.id, event.address)]

    def _spawned(self, child: int, pid: int) -> list[Instruction]:
        if self._engine and self._engine.id == child:
            self._engine.pid = pid
            return self._publish(engine_pid=pid)
        if self._text and self._text.id == child:
            self._text.pid = pid
            return self._publish(text_pid=pid)
        return []

    def _received(self, child: int, message: Message) -> list[Instruction]:
        engine = self._engine if self._engine and self._engine.id == child else None
        text = self._text if self._text and self._text.id == child else None
        match message:
            case Rendezvous(address) if engine:
                return self._publish(rendezvous=address) + self._ask_peers(address)
            case EngineReady() if engine:
                engine.ready, self._limits = True, message
                return self._begin()
            case TextReady(longest_token_bytes) if text:
                text.ready, text.longest_token_bytes = True, longest_token_bytes
                return self._begin()
            case EngineFailed(reason, explanation, permanent) if engine or text:
                return self._fail(f"{reason}: {explanation}", permanent)
        return []

    def _ask_peers(self, rendezvous: str) -> list[Instruction]:
        """Ask the workers of the other ranks to start theirs. Of life 0 they know from the assignment."""
        assignment = self._assignment
        if assignment is None or assignment.life == 0:
            return []
        return [
            AskPeerToStart(address, rank, assignment.replica, assignment.epoch, assignment.life, rendezvous)
            for rank, address in enumerate(assignment.addresses[1:], start=1)
        ]

    def _exited(self, child: int, status: str) -> list[Instruction]:
        if self._engine and self._engine.id == child:
            self._engine = None
            return self._fail(f"the engine {status}", permanent=False)
        if self._text and self._text.id == child:
            self._text = None
            # A leader without its text process cannot serve, whatever its engine does.
            todo = self._fail(f"the text process {status}", permanent=False)
            return todo or self._publish(text_pid=0)
        return []

    def _hung(self, child: int, status: str) -> list[Instruction]:
        if self._engine and self._engine.id == child:
            return self._fail(f"the engine {status}", permanent=False)
        if self._text and self._text.id == child:
            todo = self._kill_text()
            failed = self._fail(f"the text process {status}", permanent=False)
            return todo + (failed or self._publish(text_pid=0))
        return []

    def _begin(self) -> list[Instruction]:
        """Serve and publish it, once every child that this rank needs is ready."""
        assignment, engine, text, limits = self._assignment, self._engine, self._text, self._limits
        if assignment is None or engine is None or limits is None or self._record is None:
            return []
        if self._record.state is not ShardState.STARTING:
            return []
        if assignment.rank != 0:
            return self._publish(state=ShardState.READY)
        if text is None or not text.ready:
            return []
        self._serving = True
        # Serving begins first: a gateway may come as soon as the status is published.
        return [
            BeginServing(
                assignment.replica, assignment.epoch, engine.id, text.id, limits, text.longest_token_bytes
            ),
            *self._publish(
                state=ShardState.READY, model_hash=limits.model_hash, max_model_len=limits.max_model_len
            ),
        ]

    def _fail(self, reason: str, permanent: bool) -> list[Instruction]:
        """End the epoch on this shard. The first failure's reason is kept."""
        if self._record is None or self._record.state is ShardState.FAILED:
            return []
        reason = _printable(reason)
        todo = self._end(reason) + self._kill_engine()
        return todo + self._publish(
            state=ShardState.FAILED,
            reason=reason,
            permanent=permanent,
            engine_pid=0,
            text_pid=self._text.pid if self._text else 0,
        )

    def _publish(self, **changes: object) -> list[Instruction]:
        assert self._record is not None, "only a worker with a rank has children"
        record = replace(self._record, **changes)  # type: ignore[arg-type]  # field names are literal above
        if record == self._record:
            return []
        self._record = record
        return [Publish(record)]

    def _end(self, reason: str) -> list[Instruction]:
        if not self._serving or self._assignment is None:
            return []
        self._serving = False
        return [EndServing(self._assignment.epoch, reason)]

    def _kill_engine(self) -> list[Instruction]:
        engine, self._engine = self._engine, None
        return [Kill(engine.id)] if engine else []

    def _kill_text(self) -> list[Instruction]:
        text, self._text, self._text_start = self._text, None, None
        return [Kill(text.id)] if text else []

    def _number(self) -> int:
        self._children += 1
        return self._children


def _printable(reason: str) -> str:
    """A child's reason, short and in valid UTF-8: file names may bring lone surrogates."""
    return reason[:MAX_REASON].encode("utf-8", "replace").decode()
