"""Whole models through the GPU's kernels, and decode steps captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.distributed.parallel import Parallel
from engine.execution import cuda_graphs
from engine.execution.cuda_graphs import (
    CaptureSchedule,
    CudaGraphCapture,
    DecodeGraphs,
    Work,
    bucket_sizes,
    pad,
)
from engine.execution.runner import Runner
from engine.execution.step_input import SlotTensors, StepInput, StepTensors
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
# Padding rows compute with arbitrary numbers. In Triton's interpreter, NumPy warns where these overflow.
pytestmark = pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
TOKENS = 48 if GPU else 8  # on a GPU enough steps for captures, which are real there
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
    """A capture without CUDA: replays by calling the work again and copying into the first results."""
    results = work()

    def again() -> None:
        for first, new in zip(results, work(), strict=True):
            first.copy_(new)

    return again, results


class Rank:
    """A rank that runs sequences, each sampled with its own seed."""

    def __init__(self, directory: Path, *, captured: bool) -> None:
        config, grid = ModelConfig.load(directory), Grid(1, 1, 0)
        kernels = GpuKernels(DEVICE, FLOAT)
        weights = load_weights(str(directory), config, grid, kernels)
        cache = kernels.cache(config.num_layers, config.num_kv_heads, config.head_dim, 16)
        engine = EngineConfig(str(directory), epoch=1, max_running=8)
        capture = by_hand if captured else None
        self.runner = Runner(engine, config, weights, Parallel(grid), kernels, cache, 64, capture)
        self.lengths: dict[int, int] = {}
        self.steps = 0

    def step(self, chunks: dict[int, tuple[int, ...]], options: dict[int, SamplingParams]) -> tuple[int, ...]:
        """Feed tokens to sequences, and return the token that each sequence samples."""
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
        pending = self.runner.run(StepPlan(1, self.steps, (), tuple(new_sequences), tuple(rows)))
        assert pending is not None
        return pending().token_ids


def test_captured_steps_sample_the_same_tokens(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "_STEPS_BEFORE_CAPTURE", 2)
    monkeypatch.setattr(cuda_graphs, "_STEPS_BETWEEN_CAPTURES", 1)
    options = {
        0: SamplingParams(temperature=0),
        1: SamplingParams(temperature=1, seed=4),
        2: SamplingParams(temperature=0.8, seed=5, presence_penalty=1.5),
    }
    outputs = []
    for captured in (False, True):
        rank = Rank(model_dir, captured=captured)
        last = dict(zip((0, 1), rank.step({0: (1, 2, 3), 1: (4, 5)}, options), strict=True))
        output = [last]
        for step in range(5):
            chunks = {slot: (token,) for slot, token in last.items()}
            if step == 3:
                chunks[2] = (7, 8, 9)  # a prompt among decodes: no graph fits this step
            last = dict(zip(chunks, rank.step(chunks, options), strict=True))
            output.append(last)
        outputs.append(output)
    assert outputs[0] == outputs[1]


def test_a_capture_runs_only_padding_rows(model_dir: Path) -> None:
    calls: list[int] = []

    def logits(tensors: StepTensors) -> torch.Tensor:
        calls.append(tensors.num_tokens)
        assert (tensors.attention.slots_T == -1).all()
        return torch.zeros(tensors.num_tokens, 10, device=DEVICE)

    DecodeGraphs(logits, SlotTensors(8, 4, DEVICE), 8, by_hand)._capture_bucket(4)
    assert calls == [4]


def test_small_buckets_are_captured_first_and_one_at_a_time() -> None:
    schedule = CaptureSchedule(bucket_sizes(20))
    due = [schedule.next_bucket() for _ in range(200)]
    steps_before = cuda_graphs._STEPS_BEFORE_CAPTURE - 1
    assert due[:steps_before] == [None] * steps_before
    assert [bucket for bucket in due if bucket] == [1, 2, 4, 8, 16, 20]
    places = [place for place, bucket in enumerate(due) if bucket]
    assert {later - earlier for earlier, later in pairwise(places)} == {cuda_graphs._STEPS_BETWEEN_CAPTURES}


@pytest.mark.parametrize("max_size", [1, 3, 8, 100, 256, 1000])
def test_the_largest_batch_has_a_bucket(max_size: int) -> None:
    buckets = bucket_sizes(max_size)
    assert buckets[-1] == max_size
    assert list(buckets) == sorted(set(buckets))


def test_padding_rows_have_no_slot() -> None:
    padded = pad(StepInput([5], [3], [2], [2, 0, 1, 3], [0], max_queries=1, num_single_queries=1), 3)
    assert padded.slots == [2, -1, -1]
    assert padded.sequences == [2, 0, 1, 3, *[0] * 8]
    assert len(padded.numbers) == 3 * 8


def test_captured_steps_give_the_next_step_its_pending_tokens(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "_STEPS_BEFORE_CAPTURE", 2)
    monkeypatch.setattr(cuda_graphs, "_STEPS_BETWEEN_CAPTURES", 1)
    requests = [
        Request("greedy", (1, 2, 3), SamplingParams(temperature=0), TOKENS),
        Request("seeded", (4, 5), SamplingParams(seed=3), TOKENS),
    ]
    kernels = GpuKernels(DEVICE, FLOAT)
    plain, _ = core_of(model_dir, kernels, async_scheduling=False)
    asynchronous, runner = core_of(
        model_dir, kernels, async_scheduling=True, capture=CudaGraphCapture() if GPU else by_hand
    )
    assert outputs(asynchronous, requests) == outputs(plain, requests)
    assert runner.plans_with_pending_tokens
