"""When its device fails, an engine reports why and ends, its worker knows, and the next engine serves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.ipc.link import LinkClosedError
from engine.ipc.wire import EngineFailed, EngineReady, StartEngine, SubmitRequest
from engine.request import Request, SamplingParams
from tests.device import GPU
from tests.engine.child import DEADLINE_S, Child, child
from tests.gpu.faulty_engine import IN_A_KERNEL, LOST, NO_MEMORY

DEVICE = "cuda:0" if GPU else "cpu"
PETABYTE = 1 << 50


def serving(process: Child, directory: Path, kv_bytes: int = 1 << 20, max_running: int = 8) -> None:
    config = EngineConfig(str(directory), device=DEVICE, kv_bytes=kv_bytes, max_running=max_running)
    process.send(StartEngine(config))


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
    # A host with only the engine's requirements may lack protobuf.
    shard = pytest.importorskip("tests.gpu.shard").Shard(model_dir, DEVICE)
    answers, named = [], 0
    for life in range(2):
        assert len(shard.starts) == life + 1
        with child("tests.gpu.faulty_engine") as process:
            config = replace(shard.starts[life].config, kv_bytes=1 << 20, max_running=8)
            process.send(StartEngine(config))
            shard.engine_said(process.expect(EngineReady))
            answers.append(answer(process))
            process.send(SubmitRequest(Request("bad", (1, token))))
            try:
                shard.engine_said(process.expect(EngineFailed))
                assert process.process.wait(DEADLINE_S) == 1
            except LinkClosedError:
                assert token == LOST, "the driver may end the process of a lost device"
                shard.engine_ended()
        assert shard.failure.startswith((reason, "the engine has ended"))
        named += shard.failure.startswith(reason)
        assert len(shard.killed) == named, "an engine that has ended is not killed"
        shard.abandoned(life)
    assert answers[0] == answers[1]


def test_a_cache_that_does_not_fit_is_named(model_dir: Path) -> None:
    with child("engine.processes.rank") as process:
        # An engine allocates no more blocks than max_running sequences can fill.
        serving(process, model_dir, PETABYTE, max_running=1 << 30)
        assert process.expect(EngineFailed).reason == "OUT_OF_MEMORY"
        assert process.process.wait(DEADLINE_S) == 1
    with child("engine.processes.rank") as process:
        serving(process, model_dir)
        process.expect(EngineReady)
        assert len(answer(process)) == 8
