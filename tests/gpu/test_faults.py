"""A device that fails under an engine: it says why and ends, its worker knows, and the next one serves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from controlplane.state import ShardRecord, ShardState
from dataplane.shard.events import Abandoned, Assigned, Event, Exited, Kill, Publish, Received, SpawnEngine
from dataplane.shard.supervisor import Supervisor
from engine.link import LinkClosedError
from engine.request import Request, SamplingParams
from engine.wire import EngineFailed, EngineReady, Message, StartEngine, SubmitRequest
from tests.device import GPU
from tests.engine.child import DEADLINE_S, Child, child
from tests.gpu.faulty_engine import IN_A_KERNEL, LOST, NO_MEMORY

DEVICE = "cuda:0" if GPU else "cpu"
PETABYTE = 1 << 50


class Shard:
    """A worker's decisions about its engine, which is a real process."""

    def __init__(self, directory: Path) -> None:
        self._core = Supervisor("worker-0", "boot", "127.0.0.1", DEVICE)
        self.starts: list[StartEngine] = []
        self.record: ShardRecord | None = None
        self.killed: list[int] = []
        self._child = 0
        self.told(Assigned("d-0", 0, 1, str(directory), tp=1, pp=1))

    def told(self, event: Event) -> None:
        for instruction in self._core.handle(event):
            match instruction:
                case SpawnEngine(child, start):
                    self._child = child
                    self.starts.append(start)
                case Publish(record):
                    self.record = record
                case Kill(child):
                    self.killed.append(child)
        self._core.check_integrity()

    def engine_said(self, message: Message) -> None:
        self.told(Received(self._child, message))

    def engine_ended(self) -> None:
        self.told(Exited(self._child, "has ended"))


def serving(process: Child, directory: Path, kv_bytes: int = 1 << 20, max_running: int = 8) -> None:
    options = {"device": DEVICE, "kv_bytes": kv_bytes, "max_running": max_running}
    process.send(StartEngine(str(directory), 1, 1, 0, 1, "127.0.0.1", **options))  # type: ignore[arg-type]


def answer(process: Child) -> list[int]:
    deltas = process.run(Request("whole", (1, 2, 3), SamplingParams(temperature=0), 8, ignore_eos=True))
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize(
    ("token", "reason"),
    [(IN_A_KERNEL, "DEVICE_FAILED"), (NO_MEMORY, "OUT_OF_MEMORY"), (LOST, "DEVICE_FAILED")],
)
def test_a_failed_device_is_named_and_the_next_engine_serves(
    model_dir: Path, token: int, reason: str
) -> None:
    shard, answers = Shard(model_dir), []
    for life in range(2):
        assert len(shard.starts) == life + 1
        with child("tests.gpu.faulty_engine") as process:
            process.send(replace(shard.starts[life], kv_bytes=1 << 20, max_running=8))
            shard.engine_said(process.expect(EngineReady))
            answers.append(answer(process))
            process.send(SubmitRequest(Request("bad", (1, token))))
            try:
                shard.engine_said(process.expect(EngineFailed))
                assert process.process.wait(DEADLINE_S) == 1
            except LinkClosedError:
                assert token == LOST, "what is left of a lost device may end its process"
                shard.engine_ended()
        assert shard.record is not None
        assert shard.record.state is ShardState.FAILED
        assert not shard.record.permanent
        assert shard.record.reason.startswith((reason, "the engine has ended"))
        assert len(shard.killed) == (life + 1 if shard.record.reason.startswith(reason) else 0)
        shard.told(Abandoned(1, life))
    assert answers[0] == answers[1]


def test_a_cache_that_does_not_fit_is_named(model_dir: Path) -> None:
    with child("engine.process") as process:
        serving(process, model_dir, PETABYTE, 1 << 30)  # a pool is no larger than those running can fill
        assert process.expect(EngineFailed).reason == "OUT_OF_MEMORY"
        assert process.process.wait(DEADLINE_S) == 1
    with child("engine.process") as process:
        serving(process, model_dir)
        process.expect(EngineReady)
        assert len(answer(process)) == 8
