"""CUDA graphs of decode steps: one launch replays hundreds of kernels.

Launched one by one, the kernels would be shorter than the time to launch them, and the GPU would wait.

Shapes: S sequences, n sequences of a bucket, V vocabulary.

A captured graph holds a step of n sequences with one query each, from token ids to sampled tokens. Its inputs
are at fixed addresses, in one tensor. A smaller batch is padded with rows that attention skips. The number of
decode steps alone decides when a bucket is captured. So all tensor parallel ranks capture it at the same
step, as they must: the graph contains their collectives.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.execution.step_input import SlotTensors, StepInput, StepTensors
from engine.kernels.gpu.sample import SPEC_INTS, pack, sample
from engine.kernels.transfer import to_device

# Decode steps before the first capture. The warm-up runs about half of them. The other half keeps the first
# requests after the start from waiting for a capture.
_STEPS_BEFORE_CAPTURE = 64
_STEPS_BETWEEN_CAPTURES = 16
_GREEDY = (0,) * SPEC_INTS

Work = Callable[[], tuple[torch.Tensor, torch.Tensor]]
Capture = Callable[[Work], tuple[Callable[[], None], tuple[torch.Tensor, torch.Tensor]]]
"""Captures the device work of a function; returns a function that replays it, and the tensors it fills."""


def bucket_sizes(max_size: int) -> tuple[int, ...]:
    """The batch sizes to capture, up to `max_size`. Small ones are dense: there padding costs the most."""
    sizes = [1, 2, 4, *range(8, 33, 8), *range(48, 129, 16), *range(160, 257, 32), *range(320, 2049, 64)]
    return (*(size for size in sizes if size < max_size), max_size)


class CaptureSchedule:
    """When each bucket is captured: one at a time, the smallest first, none during the first steps."""

    def __init__(self, buckets: tuple[int, ...]) -> None:
        self._buckets_left = list(buckets)
        self._steps = 0

    def next_bucket(self) -> int | None:
        """Count a decode step; returns the bucket to capture in it, or None."""
        self._steps += 1
        if (
            not self._buckets_left
            or self._steps < _STEPS_BEFORE_CAPTURE
            or self._steps % _STEPS_BETWEEN_CAPTURES
        ):
            return None
        return self._buckets_left.pop(0)


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    """The graph of one bucket and its tensors, which every replay overwrites."""

    numbers: torch.Tensor  # int32: the inputs
    replay: Callable[[], None]
    logits_nV: torch.Tensor
    ids_n: torch.Tensor


class DecodeGraphs:
    """The captured graphs of one rank.

    Owns: the graphs, their inputs and outputs. Does not own: the model and the slot tensors, whose addresses
    are in the graphs.

    Args:
        logits: computes a step's float32 logits.
        slot_tensors: the step's block tables and last sampled tokens.
        max_sequences: the size of the largest batch.
        capture: how device work is captured.
    """

    def __init__(
        self,
        logits: Callable[[StepTensors], torch.Tensor],
        slot_tensors: SlotTensors,
        max_sequences: int,
        capture: Capture,
    ) -> None:
        self._logits, self._slot_tensors, self._capture = logits, slot_tensors, capture
        self._buckets = bucket_sizes(max_sequences)
        self._schedule = CaptureSchedule(self._buckets)
        self._graphs: dict[int, CapturedGraph] = {}
        self._max_sequences = max_sequences
        self._logits_SV: torch.Tensor | None = None  # of the last step: all graphs write to this one tensor

    def run(self, step_input: StepInput) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Replay a decode step. Returns its logits [S, V] and sampled ids [S], or None if no graph fits.

        The next replay overwrites both. The replay also stores the ids in the slot tensors.
        """
        rows = len(step_input.token_ids)
        if step_input.max_queries != 1 or len(step_input.specs) != rows or step_input.prompts:
            return None
        due = self._schedule.next_bucket()
        if due is not None:
            self._graphs[due] = self._capture_bucket(due)
        bucket = self._buckets[bisect_left(self._buckets, rows)]
        graph = self._graphs.get(bucket)
        if graph is None:
            return None
        padded = pad(step_input, bucket)
        graph.numbers.copy_(to_device(padded.numbers + _packed_specs(padded), graph.numbers.device))
        graph.replay()
        return graph.logits_nV[:rows], graph.ids_n[:rows]

    def _capture_bucket(self, bucket: int) -> CapturedGraph:
        """Capture a step of padding rows only: the capture also runs the step, which must change nothing."""
        empty = pad(StepInput([], [], [], [], []), bucket)
        device = self._slot_tensors.last_token_ids.device
        numbers = to_device(empty.numbers + _packed_specs(empty), device)
        spec_numbers = bucket * SPEC_INTS
        inputs, specs = numbers[:-spec_numbers], numbers[-spec_numbers:].view(bucket, SPEC_INTS)

        def work() -> tuple[torch.Tensor, torch.Tensor]:
            tensors = StepTensors.of(empty, inputs, self._slot_tensors)
            logits_nV = self._logits(tensors)
            ids_n = sample(logits_nV, specs)
            tensors.store_sampled(ids_n, self._slot_tensors)
            if self._logits_SV is None:  # the first call, before anything is captured
                self._logits_SV = logits_nV.new_empty(self._max_sequences, logits_nV.shape[1])
            return self._logits_SV[:bucket].copy_(logits_nV), ids_n

        replay, (logits_nV, ids_n) = self._capture(work)
        return CapturedGraph(numbers, replay, logits_nV, ids_n)


def pad(step_input: StepInput, rows: int) -> StepInput:
    """A decode step's input with padding rows: they have slot -1 and attend to nothing."""
    padding = rows - len(step_input.token_ids)
    return StepInput(
        step_input.token_ids + [0] * padding,
        step_input.positions + [0] * padding,
        step_input.slots + [-1] * padding,
        step_input.sequences + [0] * 4 * padding,
        [*step_input.sample_rows, *range(rows - padding, rows)],
        step_input.specs,
        max_queries=1,
        num_single_queries=rows,
        has_pending_tokens=True,
    )


def _packed_specs(padded: StepInput) -> list[int]:
    """The specs of all rows. Padding rows sample greedily; their tokens are not read."""
    return pack(padded.specs) + [*_GREEDY] * (len(padded.token_ids) - len(padded.specs))


class CudaGraphCapture:
    """Captures CUDA graphs. They share one memory pool, because only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all captures: cuBLAS keeps a workspace per stream that it has seen.
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Work) -> tuple[Callable[[], None], tuple[torch.Tensor, torch.Tensor]]:
        """See `Capture`."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()  # compiles kernels and allocates workspaces, which must not happen during a capture
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, for example NCCL's, may call CUDA during the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = work()
        return graph.replay, results
