"""Decode steps recorded once and repeated: one launch instead of hundreds, which a GPU would wait for.

Shapes: S sequences, n of a bucket, V vocabulary.

A recording holds a step of up to n sequences with one query each, from token ids to the tokens drawn. Its
inputs lie at fixed places, in one tensor; shorter batches are padded with rows that attention passes over.
Which bucket is recorded when follows from the steps alone, so that tensor parallel ranks, whose collectives
are in the recording, do it at the same step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.execution.batch import Batch, Layout, SlotState
from engine.kernels.gpu.draw import ROW, draw, pack
from engine.kernels.transfer import to_device

_FIRST_AFTER = 64  # decode steps, half of them rehearsed: recording is not to keep the first requests waiting
_EVERY = 16
_GREEDY = (0,) * ROW

Work = Callable[[], tuple[torch.Tensor, torch.Tensor]]
Record = Callable[[Work], tuple[Callable[[], None], tuple[torch.Tensor, torch.Tensor]]]
"""Records what some work does on the device; returns what repeats it, and the results that this fills."""


def buckets_up_to(most: int) -> tuple[int, ...]:
    """Sizes of batches that are recorded: close together where padding would cost much."""
    sizes = [1, 2, 4, *range(8, 33, 8), *range(48, 129, 16), *range(160, 257, 32), *range(320, 2049, 64)]
    return (*(size for size in sizes if size < most), most)


class Recordings:
    """When each bucket is recorded: one at a time, small ones first, and not under the first requests."""

    def __init__(self, buckets: tuple[int, ...]) -> None:
        self._left = list(buckets)
        self._steps = 0

    def due(self) -> int | None:
        """The bucket to record at this decode step, if any."""
        self._steps += 1
        if not self._left or self._steps < _FIRST_AFTER or self._steps % _EVERY:
            return None
        return self._left.pop(0)


@dataclass(frozen=True, slots=True)
class _Recording:
    numbers: torch.Tensor  # int32: the inputs
    repeat: Callable[[], None]
    logits_nV: torch.Tensor
    ids_n: torch.Tensor


class DecodeGraphs:
    """The recordings of one rank. Does not own: the model, what is kept of slots; their places are in them.

    Args:
        logits: a batch's float32 logits.
        known: what the device keeps of every slot.
        most: sequences of the largest batch.
        record: how work is recorded.
    """

    def __init__(
        self, logits: Callable[[Batch], torch.Tensor], known: SlotState, most: int, record: Record
    ) -> None:
        self._logits, self._known, self._record = logits, known, record
        self._buckets = buckets_up_to(most)
        self._recordings = Recordings(self._buckets)
        self._recorded: dict[int, _Recording] = {}
        self._most = most
        self._kept_SV: torch.Tensor | None = None  # logits of the last step, whichever recording had it

    def run(self, layout: Layout) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """A step's logits [S, V] and the tokens [S] that they draw; nothing where it is not recorded.

        Both are overwritten by the next step. The tokens have been noted.
        """
        rows = len(layout.token_ids)
        if layout.most_queries != 1 or len(layout.draws) != rows or layout.prompts:
            return None, None
        due = self._recordings.due()
        if due is not None:
            self._recorded[due] = self._make(due)
        bucket = self._buckets[bisect_left(self._buckets, rows)]
        found = self._recorded.get(bucket)
        if found is None:
            return None, None
        padded = pad(layout, bucket)
        found.numbers.copy_(to_device(padded.numbers + _how(padded), found.numbers.device))
        found.repeat()
        return found.logits_nV[:rows], found.ids_n[:rows]

    def _make(self, bucket: int) -> _Recording:
        """Record a step of nothing but padding: it is also run, and must change nothing."""
        empty = pad(Layout([], [], [], [], []), bucket)
        numbers = to_device(empty.numbers + _how(empty), self._known.drawn.device)
        inputs, how = numbers[: -bucket * ROW], numbers[-bucket * ROW :].view(bucket, ROW)

        def work() -> tuple[torch.Tensor, torch.Tensor]:
            batch = Batch.of(empty, inputs, self._known)
            logits_nV = self._logits(batch)
            ids_n = draw(logits_nV, how)
            batch.keep(ids_n, self._known)
            if self._kept_SV is None:  # the first time nothing is recorded yet
                self._kept_SV = logits_nV.new_empty(self._most, logits_nV.shape[1])
            return self._kept_SV[:bucket].copy_(logits_nV), ids_n

        repeat, (logits_nV, ids_n) = self._record(work)
        return _Recording(numbers, repeat, logits_nV, ids_n)


def pad(layout: Layout, rows: int) -> Layout:
    """The layout of a decode step with more rows, which belong to nobody and attend to nothing."""
    more = rows - len(layout.token_ids)
    return Layout(
        layout.token_ids + [0] * more,
        layout.positions + [0] * more,
        layout.slots + [-1] * more,
        layout.sequences + [0] * 4 * more,
        [*layout.sample_rows, *range(rows - more, rows)],
        layout.draws,
        most_queries=1,
        single_queries=rows,
        drawn=True,
    )


def _how(layout: Layout) -> list[int]:
    """How each row is drawn; the tokens of padding are not looked at."""
    return pack(layout.draws) + [*_GREEDY] * (len(layout.token_ids) - len(layout.draws))


class CudaRecorder:
    """Records with CUDA graphs, which share one pool of memory: only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # One for all: cuBLAS keeps a workspace for every stream that it has seen.
        self._beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Work) -> tuple[Callable[[], None], tuple[torch.Tensor, torch.Tensor]]:
        """See `Record`."""
        self._beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._beside):
            work()  # what is done only once: kernels are compiled, workspaces taken
        torch.cuda.current_stream().wait_stream(self._beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile, as NCCL's do.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._beside, capture_error_mode="thread_local"):
            results = work()
        return graph.replay, results
