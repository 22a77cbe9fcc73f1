"""The order of what ranks do in steps."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from engine.distributed.parallel import Parallel
from engine.execution.step_input import StepInput, StepInputBuilder
from engine.plan import PENDING_TOKEN, StepPlan
from engine.processes import startup
from engine.processes.startup import StartedRank
from engine.request import SamplingParams
from tests.engine.processes.test_async_scheduling import outputs, some_requests
from tests.parallel.ranks import DEADLINE_S, engine_of_threads, finish

# The last stage waits in these steps until the first stage has finished the next one.
HELD_STEPS = range(5, 12)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_first_stage_computes_the_next_micro_batch_while_the_last_computes_this_one(
    model_dir: Path, tp: int
) -> None:
    done = defaultdict[int, threading.Event](threading.Event)
    first_stage_was_ahead: list[bool] = []

    def hold(rank: int, started: StartedRank) -> None:
        run = started.runner.run

        def first_stage(plan: StepPlan) -> Any:
            pending = run(plan)
            done[plan.step].set()
            return pending

        def last_stage(plan: StepPlan) -> Any:
            if plan.step in HELD_STEPS:
                first_stage_was_ahead.append(done[plan.step + 1].wait(DEADLINE_S))
            return run(plan)

        if rank == 0:
            started.runner.run = first_stage  # type: ignore[method-assign]
        elif rank >= tp:
            started.runner.run = last_stage  # type: ignore[method-assign]

    with engine_of_threads(model_dir, tp, 2, before=hold) as core:
        finish(core, requests=4, tokens=16)
    assert first_stage_was_ahead == [True] * len(HELD_STEPS) * tp


COLLECTIVES = ("all_reduce", "gather_vocab", "send_hidden", "recv_hidden")


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_every_collective_that_serving_uses_has_run_before_the_engine_is_ready(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, tp: int, pp: int
) -> None:
    used: set[tuple[int, str]] = set()
    for name in COLLECTIVES:
        original = getattr(Parallel, name)

        def noting(self: Parallel, *arguments: Any, name: str = name, original: Any = original) -> Any:
            used.add((self.grid.rank, name))
            return original(self, *arguments)

        monkeypatch.setattr(Parallel, name, noting)
    with engine_of_threads(model_dir, tp, pp) as core:
        warmed = set(used)
        finish(
            core,
            requests=3,
            sampling=SamplingParams(temperature=0.8, repetition_penalty=1.2),
            n=2,
            logprobs=2,
            prompt_logprobs=1,
        )
    assert used == warmed
    assert {rank for rank, _ in warmed} == set(range(tp * pp))


def test_ranks_fill_in_pending_tokens_with_what_they_sampled(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = some_requests(penalties=True)
    with engine_of_threads(model_dir, 2, 1) as core:
        expected = outputs(core, requests)
    monkeypatch.setattr(startup, "can_run_async", lambda *_: True)
    plans_with_pending_tokens = 0

    def counting_build(self: StepInputBuilder, plan: StepPlan) -> StepInput:
        nonlocal plans_with_pending_tokens
        plans_with_pending_tokens += any(PENDING_TOKEN in chunk.token_ids for chunk in plan.chunks)
        return build(self, plan)

    build = StepInputBuilder.build
    monkeypatch.setattr(StepInputBuilder, "build", counting_build)
    with engine_of_threads(model_dir, 2, 1) as core:
        assert outputs(core, requests) == expected
    assert plans_with_pending_tokens > 10
