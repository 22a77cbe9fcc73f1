"""Figures from a trace: rates, gaps and shares of the machine's limits. Pure."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from bench.protocol import Trace, Work
from bench.shapes import Shape

_FIRST_TOKEN_ID = 3  # ids below are special tokens


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, minimum and maximum of repeats."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return Spread(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates of the machine with all its cores: bytes read, and floating-point operations, per second."""

    memory: float
    gemm_float32: float
    gemm_bfloat16: float

    @property
    def gemm(self) -> float:
        """The better of the two: a contestant may compute in another dtype than that of the weights."""
        return max(self.gemm_float32, self.gemm_bfloat16)

    @staticmethod
    def median(turns: Sequence[Limits]) -> Limits:
        """The median of each limit over at least one turn."""
        return Limits(*(statistics.median(values) for values in zip(*map(astuple, turns), strict=True)))


def prompts(count: int, length: int, vocab: int, seed: int | str) -> list[list[int]]:
    """Prompts of random tokens. No two share a prefix, not even with different seeds."""
    rng = random.Random(seed)
    return [[rng.randrange(_FIRST_TOKEN_ID, vocab) for _ in range(length)] for _ in range(count)]


def first_token_s(trace: Trace) -> list[float]:
    """Seconds from each prompt's arrival to its first token."""
    firsts: dict[int, float] = {}
    for at, indices in trace.events:
        for index in indices:
            firsts.setdefault(index, at)
    return [firsts[index] - trace.submitted[index] for index in range(len(trace.submitted))]


def decode_rate(trace: Trace) -> float:
    """Tokens per second while all prompts decode.

    That time runs from the first token of the last prompt to the last token of the first prompt to finish. If
    a prompt finishes before another has begun, it runs to the last token of all.
    """
    start = max(at + wait for at, wait in zip(trace.submitted, first_token_s(trace), strict=True))
    lasts = {index: at for at, indices in trace.events for index in indices}
    end = min(lasts.values())
    if end <= start:
        end = trace.events[-1][0]
    count = sum(len(indices) for at, indices in trace.events if start < at <= end)
    return count / (end - start)


def median_decode_rate(trace: Trace) -> float:
    """As `decode_rate`, but from the median gap while all decode, so that outliers do not count."""
    firsts = [at + wait for at, wait in zip(trace.submitted, first_token_s(trace), strict=True)]
    lasts = {index: at for at, indices in trace.events for index in indices}
    together = gaps_s(trace, range(len(firsts)), max(firsts), min(lasts.values()))
    if not together:
        return decode_rate(trace)
    return len(firsts) / statistics.median(together)


def total_rate(trace: Trace) -> float:
    """New tokens per second, from the arrival of the first prompt to the last token."""
    return sum(map(len, trace.token_ids)) / trace.events[-1][0]


def gaps_s(trace: Trace, indices: range, start: float, end: float) -> list[float]:
    """Seconds between consecutive tokens of each of these prompts, for gaps that overlap `start` to `end`."""
    last: dict[int, float] = {}
    found: list[float] = []
    for at, came in trace.events:
        for index in came:
            if index not in indices:
                continue
            if index in last and at > start and last[index] < end:
                found.append(at - last[index])
            last[index] = at
    return found


def common_prefix(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The share of completions with equal first tokens. A low share means that two models differ."""
    return statistics.mean(float(a[0] == b[0]) for a, b in zip(ours, theirs, strict=True))


def weights_rate(shape: Shape, batch: int, rate: float, bytes_per_parameter: float) -> float:
    """Bytes of weights read per second when `batch` sequences get `rate` tokens per second together."""
    return shape.step_parameters * bytes_per_parameter * rate / batch


def decode_flops_rate(shape: Shape, work: Work, rate: float) -> float:
    """Floating-point operations per second of decoding, with the sequences at half their output."""
    lengths = [len(p) + new // 2 for p, new in zip(work.prompts, work.new_tokens, strict=True)]
    return shape.decode_flops(lengths) * rate / len(lengths)


def decode_limit(shape: Shape, work: Work, limits: Limits, bytes_per_parameter: float) -> float:
    """Tokens per second that no engine can exceed: the lower of the memory and the GEMM limit."""
    batch = len(work.prompts)
    memory = limits.memory / (shape.step_parameters * bytes_per_parameter) * batch
    return min(memory, limits.gemm / decode_flops_rate(shape, work, 1.0))
