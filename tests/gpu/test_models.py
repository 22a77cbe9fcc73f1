"""Whole models through the GPU's kernels, and decode steps captured and replayed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.distributed.parallel import Parallel
from engine.execution import graphs
from engine.execution.batch import Layout, SlotState
from engine.execution.graphs import CudaRecorder, DecodeGraphs, Recordings, Work, buckets_up_to, pad
from engine.execution.runner import Runner
from engine.grid import Grid
from engine.kernels.gpu.kernels import GpuKernels
from engine.kernels.reference import ReferenceKernels
from engine.plan import NewSequence, SequenceChunk, StepPlan
from engine.request import Request, SamplingParams
from engine.weights.loader import load_weights
from engine.weights.model_config import ModelConfig
from tests.device import GPU
from tests.engine.conftest import MakeModel
from tests.engine.harness import Harness
from tests.engine.processes.test_async_scheduling import core_of, outputs
from tests.gpu.test_kernels import DEVICE

FLOAT = torch.float32
# What pads a step is arbitrary, and NumPy, which interprets, says so where it overflows.
pytestmark = pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
TOKENS = 48 if GPU else 8  # on a GPU enough for recordings, which are real there
STEPS = (
    {0: [5, 9, 2, 7, 11], 1: [3]},
    {0: [4], 1: list(range(20, 40)), 2: [8, 8]},
    {0: [6], 1: [1], 2: [2]},
)


@pytest.mark.parametrize("family", ["Qwen3", "Mistral"])
def test_a_model_gives_the_reference_s_logits(make_model: MakeModel, family: str) -> None:
    directory = make_model(family=family, **({"sliding_window": 8} if family == "Mistral" else {}))
    ours, reference = (
        Harness(directory, kernels=kernels(DEVICE, FLOAT)) for kernels in (GpuKernels, ReferenceKernels)
    )
    for step in STEPS:
        wanted = reference.step(step)
        for slot, logits in ours.step(step).items():
            torch.testing.assert_close(logits, wanted[slot], rtol=1e-4, atol=1e-4)


def by_hand(work: Work) -> tuple[Callable[[], None], tuple[torch.Tensor, torch.Tensor]]:
    """Repeats by doing the work again, into the results of the first time."""
    results = work()

    def again() -> None:
        for kept, new in zip(results, work(), strict=True):
            kept.copy_(new)

    return again, results


class Rank:
    """A rank that serves sequences, each drawn with its own seed."""

    def __init__(self, directory: Path, *, recorded: bool) -> None:
        config, grid = ModelConfig.load(directory), Grid(1, 1, 0)
        kernels = GpuKernels(DEVICE, FLOAT)
        weights = load_weights(str(directory), config, grid, kernels)
        cache = kernels.cache(config.num_layers, config.num_kv_heads, config.head_dim, 16)
        engine = EngineConfig(str(directory), epoch=1, max_running=8)
        record = by_hand if recorded else None
        self.runner = Runner(engine, config, weights, Parallel(grid), kernels, cache, 64, record)
        self.lengths: dict[int, int] = {}
        self.steps = 0

    def step(self, chunks: dict[int, tuple[int, ...]], options: dict[int, SamplingParams]) -> tuple[int, ...]:
        """Feed tokens of sequences; what each draws."""
        new_sequences, rows = [], []
        for slot, tokens in chunks.items():
            start = self.lengths.get(slot, 0)
            blocks = (2 * slot, 2 * slot + 1) if start == 0 else ()
            if start == 0:
                logprobs = 1 if slot == 1 else None
                new_sequences.append(NewSequence(slot, len(tokens), 0, options[slot], logprobs=logprobs))
            self.lengths[slot] = start + len(tokens)
            rows.append(SequenceChunk(slot, start, tokens, blocks, sample=True))
        self.steps += 1
        drawn = self.runner.run(StepPlan(1, self.steps, (), tuple(new_sequences), tuple(rows)))
        assert drawn is not None
        return drawn().token_ids


def test_recorded_steps_draw_what_others_draw(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_FIRST_AFTER", 2)
    monkeypatch.setattr(graphs, "_EVERY", 1)
    options = {
        0: SamplingParams(temperature=0),
        1: SamplingParams(temperature=1, seed=4),
        2: SamplingParams(temperature=0.8, seed=5, presence_penalty=1.5),  # by rules
    }
    outputs = []
    for recorded in (False, True):
        rank = Rank(model_dir, recorded=recorded)
        last = dict(zip((0, 1), rank.step({0: (1, 2, 3), 1: (4, 5)}, options), strict=True))
        output = [last]
        for step in range(5):
            chunks = {slot: (token,) for slot, token in last.items()}
            if step == 3:
                chunks[2] = (7, 8, 9)  # a prompt among decodes: not a recorded step
            last = dict(zip(chunks, rank.step(chunks, options), strict=True))
            output.append(last)
        outputs.append(output)
    assert outputs[0] == outputs[1]


def test_padding_and_recording_change_nothing_in_the_cache(model_dir: Path) -> None:
    calls: list[int] = []

    def logits(batch: object) -> torch.Tensor:
        calls.append(batch.tokens)  # type: ignore[attr-defined]
        assert (batch.attention.slots_T == -1).all()  # type: ignore[attr-defined]
        return torch.zeros(batch.tokens, 10, device=DEVICE)  # type: ignore[attr-defined]

    DecodeGraphs(logits, SlotState(8, 4, DEVICE), 8, by_hand)._make(4)
    assert calls == [4]


def test_small_buckets_are_recorded_first_and_one_at_a_time() -> None:
    recordings = Recordings(buckets_up_to(20))
    due = [recordings.due() for _ in range(200)]
    assert due[: graphs._FIRST_AFTER - 1] == [None] * (graphs._FIRST_AFTER - 1)
    assert [bucket for bucket in due if bucket] == [1, 2, 4, 8, 16, 20]
    places = [place for place, bucket in enumerate(due) if bucket]
    assert {later - earlier for earlier, later in pairwise(places)} == {graphs._EVERY}


@pytest.mark.parametrize("most", [1, 3, 8, 100, 256, 1000])
def test_the_largest_batch_has_a_bucket(most: int) -> None:
    buckets = buckets_up_to(most)
    assert buckets[-1] == most
    assert list(buckets) == sorted(set(buckets))


def test_padding_belongs_to_nobody() -> None:
    padded = pad(Layout([5], [3], [2], [2, 0, 1, 3], [0], most_queries=1, single_queries=1), 3)
    assert padded.slots == [2, -1, -1]
    assert padded.sequences == [2, 0, 1, 3, *[0] * 8]
    assert len(padded.numbers) == 3 * 8


def test_recorded_steps_feed_those_planned_ahead(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_FIRST_AFTER", 2)
    monkeypatch.setattr(graphs, "_EVERY", 1)
    requests = [
        Request("greedy", (1, 2, 3), SamplingParams(temperature=0), TOKENS),
        Request("drawn", (4, 5), SamplingParams(seed=3), TOKENS),
    ]
    kernels = GpuKernels(DEVICE, FLOAT)
    plain, _ = core_of(model_dir, kernels, ahead=False)
    ahead, runner = core_of(model_dir, kernels, ahead=True, record=CudaRecorder() if GPU else by_hand)
    assert outputs(ahead, requests) == outputs(plain, requests)
    assert runner.blind
