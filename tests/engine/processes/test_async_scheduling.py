"""Async scheduling, where a step is planned while the step before runs, samples the same tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.distributed.parallel import Parallel
from engine.execution.cuda_graphs import Capture
from engine.execution.runner import Runner
from engine.grammar.service import GrammarService
from engine.grid import Grid
from engine.kernels.choose import choose_kernels
from engine.kernels.interface import Kernels
from engine.plan import PENDING_TOKEN, StepPlan
from engine.processes.core import EngineCore
from engine.request import Request, SamplingParams
from engine.sampling.sampler import PendingSample
from engine.scheduling.limits import Limits
from engine.scheduling.scheduler import Scheduler
from engine.weights.loader import load_weights
from engine.weights.model_config import ModelConfig

LONGEST = 64


class Watched(Runner):
    """Counts the plans with pending tokens, and the chunks of each plan."""

    plans_with_pending_tokens = 0
    sizes: tuple[int, ...] = ()

    def run(self, plan: StepPlan) -> PendingSample | None:
        """Count, then run as every runner."""
        self.plans_with_pending_tokens += any(PENDING_TOKEN in chunk.token_ids for chunk in plan.chunks)
        self.sizes += (len(plan.chunks),)
        return super().run(plan)


def core_of(
    directory: Path, kernels: Kernels, *, async_scheduling: bool, capture: Capture | None = None
) -> tuple[EngineCore, Watched]:
    """An engine of one rank with few KV blocks."""
    config, grid = ModelConfig.load(directory), Grid(1, 1, 0)
    weights = load_weights(str(directory), config, grid, kernels)
    cache = kernels.cache(config.num_layers, config.num_kv_heads, config.head_dim, 12)
    engine = EngineConfig(str(directory), epoch=1, max_running=4, max_batch_tokens=16)
    runner = Watched(engine, config, weights, Parallel(grid), kernels, cache, LONGEST, capture)
    limits = Limits(
        config.vocab_size,
        LONGEST,
        config.eos_token_ids,
        12,
        max_batch_tokens=16,
        max_running=4,
        async_scheduling=async_scheduling,
    )
    grammars = GrammarService(str(directory), config.vocab_size, config.eos_token_ids)
    return EngineCore(Scheduler(limits), runner, None, 0, grammars), runner


def outputs(core: EngineCore, requests: list[Request]) -> dict[tuple[str, int], tuple[list[int], str]]:
    """The tokens and the finish of each choice. Half of the requests come while the others run."""
    tokens: dict[tuple[str, int], list[int]] = {}
    finishes: dict[tuple[str, int], str] = {}
    waiting = list(requests)
    for _ in range(len(requests) // 2):
        core.submit(waiting.pop(0), 0.0)
    steps = 0
    while core.busy or waiting:
        core.launch(0.0)
        _, deltas = core.collect(0.0)
        steps += 1
        if steps % 3 == 0 and waiting:
            core.submit(waiting.pop(0), 0.0)
        for delta in deltas:
            tokens.setdefault((delta.id, delta.choice), []).extend(delta.token_ids)
            if delta.finish:
                finishes[delta.id, delta.choice] = delta.finish
    core.close()
    return {key: (ids, finishes[key]) for key, ids in tokens.items()}


def some_requests(*, penalties: bool) -> list[Request]:
    """Requests with prompts shorter and longer than a step; some have stop ids."""
    requests = []
    for number in range(6):
        sampling = SamplingParams(temperature=(number % 3) / 2, seed=number)
        if penalties and number == 2:  # while it runs, steps are not scheduled asynchronously
            sampling = SamplingParams(seed=number, presence_penalty=1.0)
        prompt = tuple(range(1, 3 + 6 * number))
        stop = (7, 11, 13) if number % 2 else ()
        choices = 2 if number == 4 else 1
        requests.append(Request(f"r{number}", prompt, sampling, 12, stop, n=choices))
    return requests


def test_async_scheduling_samples_the_same_tokens(model_dir: Path) -> None:
    kernels = choose_kernels(torch.device("cpu"), torch.float32)
    for penalties in (False, True):
        (plain, _), (overlapped, runner) = (
            core_of(model_dir, kernels, async_scheduling=one) for one in (False, True)
        )
        requests = some_requests(penalties=penalties)
        assert outputs(overlapped, requests) == outputs(plain, requests)
        assert runner.plans_with_pending_tokens > 5


def test_a_warm_up_has_batches_of_every_size_and_leaves_nothing_behind(model_dir: Path) -> None:
    kernels = choose_kernels(torch.device("cpu"), torch.float32)
    requests = [
        Request(str(number), (1, 2, 3 + number), SamplingParams(seed=number), 6) for number in range(4)
    ]
    plain, _ = core_of(model_dir, kernels, async_scheduling=True)
    warm, runner = core_of(model_dir, kernels, async_scheduling=True)
    empty = warm.load
    warm.warm_up(0.0, 3, 20, 16)
    assert {1, 2, 3} <= set(runner.sizes)
    assert warm.load.prefix_tokens == 0
    assert not warm.busy
    assert warm.load.kv_blocks_free == empty.kv_blocks_free
    assert outputs(warm, requests) == outputs(plain, requests)
