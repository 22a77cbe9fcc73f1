from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.distributed.parallel import Parallel
from engine.errors import EngineError
from engine.execution.runner import Runner
from engine.grid import Grid
from engine.kernels.choose import choose_kernels
from engine.plan import NewSequence, Sampled, SequenceChunk, StepPlan
from engine.request import SamplingParams
from engine.weights.loader import load_weights
from engine.weights.model_config import ModelConfig

CPU = torch.device("cpu")


@pytest.fixture
def runner(model_dir: Path) -> Runner:
    """A rank in epoch 4 that has run step 1."""
    config, grid = ModelConfig.load(model_dir), Grid(1, 1, 0)
    kernels = choose_kernels(CPU, torch.float32)
    weights = load_weights(str(model_dir), config, grid, kernels)
    cache = kernels.cache(config.num_layers, config.num_kv_heads, config.head_dim, 4)
    engine = EngineConfig(str(model_dir), epoch=4)
    runner = Runner(engine, config, weights, Parallel(grid), kernels, cache, 64)
    new = NewSequence(0, 3, 0, SamplingParams(temperature=0))
    pending = runner.run(StepPlan(4, 1, (), (new,), (SequenceChunk(0, 0, (1, 2, 3), (0,), sample=True),)))
    assert pending is not None
    assert len(pending().token_ids) == 1
    return runner


@pytest.mark.parametrize(("epoch", "step"), [(3, 2), (5, 2), (4, 1), (4, 3)])
def test_plans_of_another_epoch_or_out_of_order_are_refused(runner: Runner, epoch: int, step: int) -> None:
    with pytest.raises(EngineError) as caught:
        runner.run(StepPlan(epoch, step))
    assert caught.value.reason == "PLAN_REFUSED"


def test_a_refused_plan_leaves_the_rank_as_it_was(runner: Runner) -> None:
    with pytest.raises(EngineError):
        runner.run(StepPlan(4, 9, (0,)))
    pending = runner.run(StepPlan(4, 2, (), (), (SequenceChunk(0, 3, (4,)),)))
    assert pending is not None
    assert pending() == Sampled(2, (), ())
