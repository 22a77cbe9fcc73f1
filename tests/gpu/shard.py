"""A worker's supervisor, driven by the messages of a real engine."""

from __future__ import annotations

from pathlib import Path

from dataplane.shard.events import (
    ControllerTimedOut,
    Event,
    Exited,
    Kill,
    Publish,
    RankAssigned,
    Received,
    SpawnEngine,
)
from dataplane.shard.supervisor import ShardSupervisor
from engine.ipc.wire import Message, StartEngine
from phalanx.store.records import ShardRecord, ShardState


class Shard:
    """A worker's decisions about its engine, which is a real process."""

    def __init__(self, directory: Path, device: str) -> None:
        self._core = ShardSupervisor("worker-0", "boot", "127.0.0.1", device)
        self.starts: list[StartEngine] = []
        self.killed: list[int] = []
        self._record: ShardRecord | None = None
        self._child = 0
        self._handle(RankAssigned("d-0", 0, 1, str(directory), tp=1, pp=1))

    def _handle(self, event: Event) -> None:
        for instruction in self._core.handle(event):
            match instruction:
                case SpawnEngine(child, start):
                    self._child = child
                    self.starts.append(start)
                case Publish(record):
                    self._record = record
                case Kill(child):
                    self.killed.append(child)
        self._core.check_integrity()

    def engine_said(self, message: Message) -> None:
        self._handle(Received(self._child, message))

    def engine_ended(self) -> None:
        self._handle(Exited(self._child, "has ended"))

    def abandoned(self, life: int) -> None:
        self._handle(ControllerTimedOut(1, life))

    @property
    def failure(self) -> str:
        """The reason of the shard's failure, which must not be permanent."""
        assert self._record is not None
        assert self._record.state is ShardState.FAILED
        assert not self._record.permanent
        return self._record.reason
