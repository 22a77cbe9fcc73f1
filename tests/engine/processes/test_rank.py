"""The engine process over a real socket."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.ipc.link import LinkClosedError
from engine.ipc.wire import (
    CancelRequest,
    EngineFailed,
    EngineReady,
    Loading,
    Rendezvous,
    StartEngine,
    Step,
    SubmitRequest,
)
from engine.request import Delta, Load, Request, SamplingParams
from engine.weights.identity import engine_identity
from engine.weights.model_config import ModelConfig
from tests.engine.child import Child, child, engine
from tests.engine.conftest import MakeModel

SEEDED = SamplingParams(temperature=1.0, top_p=0.95, seed=11)


@pytest.fixture(scope="module")
def ready(model_dir: Path) -> Iterator[Child]:
    with engine(model_dir) as process:
        yield process


def tokens(deltas: list[Delta], choice: int = 0) -> list[int]:
    return [token for delta in deltas if delta.choice == choice for token in delta.token_ids]


def ask(name: str, length: int = 20, **fields: object) -> Request:
    prompt = tuple(range(1, length + 1))
    return Request(name, prompt, **{"max_tokens": 12, "ignore_eos": True, "sampling": SEEDED, **fields})  # type: ignore[arg-type]


def test_it_tells_what_it_serves(model_dir: Path) -> None:
    with child("engine.processes.rank") as process:
        process.send(StartEngine(EngineConfig(str(model_dir), epoch=5, max_model_len=200)))
        assert process.expect(Loading).fraction <= 1
        identity = engine_identity(EngineConfig(str(model_dir)), ModelConfig.load(model_dir))
        assert process.expect(EngineReady) == EngineReady(identity, 200, 320, (0,))


def test_a_request_is_accepted_before_its_first_token(ready: Child) -> None:
    ready.send(SubmitRequest(ask("a")))
    accepted = ready.expect(Step, lambda step: step.accepted)
    assert (accepted.accepted, accepted.deltas, accepted.load.waiting) == (("a",), (), 1)
    steps = [ready.expect(Step, lambda step: step.deltas) for _ in range(12)]
    numbers = [step.step for step in steps]
    assert numbers == list(range(numbers[0], numbers[0] + 12))
    assert [delta.index for step in steps for delta in step.deltas] == list(range(12))
    (last,) = steps[-1].deltas
    assert last.finish == "length"
    assert last.timing is not None
    assert last.timing.queued <= last.timing.scheduled <= last.timing.first_token <= last.timing.finished
    load = steps[-1].load
    assert load == Load(0, 0, load.kv_blocks_total, load.kv_blocks_total, load.prefix_tokens)


def test_a_seeded_continuation_is_the_undisturbed_run(ready: Child) -> None:
    whole = ready.run(ask("whole", n=2, logprobs=2))
    prior = (tuple(tokens(whole, 0)[:5]), tuple(tokens(whole, 1)[:9]))
    rest = ready.run(ask("rest", n=2, logprobs=2, prior=prior))
    for choice in (0, 1):
        assert [*prior[choice], *tokens(rest, choice)] == tokens(whole, choice)
        expected = [d.logprobs for d in whole if d.choice == choice][len(prior[choice]) :]
        assert [d.logprobs for d in rest if d.choice == choice] == expected, "not the same to the last bit"
    assert tokens(whole, 0) != tokens(whole, 1)


def test_a_request_alone_and_among_others_gets_the_same_tokens(ready: Child) -> None:
    alone = ready.run(ask("alone", logprobs=1))
    for i in range(6):
        ready.send(SubmitRequest(ask(f"beside{i}", length=7 * i + 1, max_tokens=20)))
    among = ready.run(ask("among", logprobs=1))
    assert tokens(among) == tokens(alone)
    assert [delta.logprobs for delta in among] == [delta.logprobs for delta in alone]
    ready.expect(Step, lambda step: step.load.running + step.load.waiting == 0)


def test_a_prompt_found_in_the_cache_gets_the_same_tokens(ready: Child) -> None:
    asked = replace(ask("first", logprobs=1), prompt_ids=tuple(range(200, 250)))
    first, again = ready.run(asked), ready.run(replace(asked, id="again"))
    assert (first[0].cached_tokens, again[0].cached_tokens) == (0, 48)
    assert tokens(again) == tokens(first)
    assert [delta.logprobs for delta in again] == [delta.logprobs for delta in first]


def test_choices_share_a_prompt_and_get_the_tokens_of_choices_alone(ready: Child) -> None:
    greedy = SamplingParams(temperature=0)
    for length in (40, 48):  # ends within a block, and with one
        alone = ready.run(ask(f"alone{length}", length=length, sampling=greedy, prompt_logprobs=0))
        together = ready.run(ask(f"together{length}", length=length, sampling=greedy, n=3))
        assert [tokens(together, choice) for choice in range(3)] == [tokens(alone)] * 3


def test_a_cancelled_request_has_left_by_the_next_step(ready: Child) -> None:
    ready.send(SubmitRequest(ask("gone", max_tokens=400)), SubmitRequest(ask("stays", max_tokens=400)))
    ready.expect(Step, lambda step: len(step.deltas) == 2)
    ready.send(CancelRequest("gone"))
    step = ready.expect(Step, lambda step: all(delta.id != "gone" for delta in step.deltas))
    assert step.load.running == 1
    ready.send(CancelRequest("stays"), CancelRequest("never heard of"))
    idle = ready.expect(Step, lambda step: step.load.running == 0)
    assert idle.load.kv_blocks_free == idle.load.kv_blocks_total


def test_a_bad_request_is_refused_and_harms_nobody(ready: Child) -> None:
    ready.send(SubmitRequest(ask("long", length=300, max_tokens=300)))
    (refusal,) = ready.expect(Step, lambda step: step.failed).failed
    assert (refusal.id, refusal.reason) == ("long", "MAX_TOKENS_TOO_LARGE")
    assert len(tokens(ready.run(ask("next")))) == 12


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"tp": 3}, "INVALID_LAYOUT"), ({"pp": 5}, "INVALID_LAYOUT"), ({"dtype": "int3"}, "INVALID_LAYOUT")],
    ids=["tp", "pp", "dtype"],
)
def test_a_layout_that_cannot_be_is_a_permanent_failure(
    model_dir: Path, fields: dict[str, int], reason: str
) -> None:
    with child("engine.processes.rank") as process:
        process.send(StartEngine(EngineConfig(str(model_dir), **fields)))  # type: ignore[arg-type]
        failed = process.expect(EngineFailed)
        assert (failed.reason, failed.permanent) == (reason, True)
        assert process.process.wait(20) == 1


def test_it_ends_when_its_socket_closes(model_dir: Path) -> None:
    with engine(model_dir) as process:
        process.send(SubmitRequest(ask("a", max_tokens=400)))
        process.expect(Step, lambda step: step.deltas)
        process.link.close()
        assert process.process.wait(20) == 0


def test_it_dies_with_its_parent(model_dir: Path) -> None:
    script = f"""
        import sys
        sys.path.insert(0, {str(Path.cwd())!r})
        from tests.engine.child import engine
        from pathlib import Path
        with engine(Path({str(model_dir)!r})) as process:
            print(process.process.pid, flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        orphan = os.pidfd_open(pid)
        parent.send_signal(signal.SIGKILL)
    ended, _, _ = select.select([orphan], [], [], 20)
    os.close(orphan)
    assert ended


def test_a_lost_rank_ends_the_others(make_model: MakeModel) -> None:
    model = make_model(num_hidden_layers=2)
    with child("engine.processes.rank") as leader, child("engine.processes.rank") as other:
        for rank, process in enumerate((leader, other)):
            process.send(StartEngine(EngineConfig(str(model), pp=2, rank=rank, epoch=3)))
        other.send(leader.expect(Rendezvous))
        leader.expect(EngineReady)
        other.expect(EngineReady)
        other.process.kill()
        failed = leader.expect(EngineFailed)
        assert (failed.reason, failed.permanent) == ("RANK_LOST", False)
        with pytest.raises(LinkClosedError):
            leader.next()
