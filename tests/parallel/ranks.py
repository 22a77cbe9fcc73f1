"""All ranks of an engine as threads of this process: a test sees what each rank does, and can delay one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.distributed.channel import PlanLink
from engine.errors import EngineError
from engine.processes.core import EngineCore
from engine.processes.startup import StartedRank, start_rank
from engine.request import Request, SamplingParams

DEADLINE_S = 60.0


@contextmanager
def engine_of_threads(
    model: Path, tp: int, pp: int, *, before: Callable[[int, StartedRank], None] = lambda rank, started: None
) -> Iterator[EngineCore]:
    """A ready core. `before` is called with each rank, in its thread, once it has started."""
    address: Future[str] = Future()

    def rank_main(rank: int) -> None:
        engine = EngineConfig(str(model), tp=tp, pp=pp, rank=rank, threads=1, kv_bytes=1 << 20)
        started = start_rank(engine, address.set_result, address.result, lambda fraction: None)
        assert started.plans is not None
        before(rank, started)
        with closing(started.plans), pytest.raises(EngineError, match="has gone"):
            follow(started, started.plans)

    with ThreadPoolExecutor(tp * pp) as pool:
        others = [pool.submit(rank_main, rank) for rank in range(1, tp * pp)]

        def check() -> None:
            for other in others:
                if other.done():
                    other.result()

        engine = EngineConfig(str(model), tp=tp, pp=pp, threads=1, kv_bytes=1 << 20)
        started = start_rank(engine, address.set_result, lambda: "", lambda fraction: None, check)
        assert started.core is not None
        with closing(started.core):
            before(0, started)
            yield started.core
        for other in others:
            other.result(DEADLINE_S)


def follow(started: StartedRank, plans: PlanLink) -> None:
    """Execute plans until the leader goes."""
    while plan := plans.receive():
        pending = started.runner.run(plan)
        if pending is not None:
            plans.send(pending())


def finish(core: EngineCore, requests: int, tokens: int = 8, **options: Any) -> None:
    """Serve some requests to their end."""
    for number in range(requests):
        prompt = tuple(range(1, 4 + number))
        sampling = options.get("sampling", SamplingParams(temperature=0))
        rest = {name: value for name, value in options.items() if name != "sampling"}
        core.submit(Request(str(number), prompt, sampling, tokens, ignore_eos=True, **rest), 0.0)
    while core.busy:
        core.launch(0.0)
        core.collect(0.0)
