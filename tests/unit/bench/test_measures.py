"""Figures from traces."""

from __future__ import annotations

import pytest

from bench.engine import Point
from bench.measures import (
    Limits,
    Spread,
    common_prefix,
    decode_flops_rate,
    decode_limit,
    decode_rate,
    first_token_s,
    gaps_s,
    prompts,
    total_rate,
    weights_rate,
)
from bench.protocol import Trace, Work
from bench.shapes import SHAPES, Shape

# Two prompts. The second gets its first token while the first is already decoding.
TRACE = Trace(
    token_ids=[[5, 5, 5, 5], [6, 6]],
    submitted=[0.0, 0.5],
    events=[(1.0, [0]), (2.0, [0, 1]), (2.5, [0, 1]), (4.0, [0])],
)


def test_decoding_counts_while_all_decode() -> None:
    assert decode_rate(TRACE) == pytest.approx(2 / 0.5)


def test_decoding_counts_to_the_end_when_one_is_done_before_another_begins() -> None:
    trace = Trace(
        [[5, 5], [6, 6, 6]], [0.0, 0.0], [(1.0, [0]), (2.0, [0]), (3.0, [1]), (4.0, [1]), (5.0, [1])]
    )
    assert decode_rate(trace) == pytest.approx(2 / 2.0)


def test_limits_of_several_turns_are_their_medians() -> None:
    turns = [Limits(1.0, 9.0, 3.0), Limits(3.0, 8.0, 2.0), Limits(2.0, 7.0, 1.0)]
    assert Limits.median(turns) == Limits(2.0, 8.0, 2.0)


def test_the_first_token_counts_from_a_prompts_own_arrival() -> None:
    assert first_token_s(TRACE) == [1.0, 1.5]


def test_the_total_rate_counts_all_tokens_from_the_start() -> None:
    assert total_rate(TRACE) == pytest.approx(6 / 4.0)


def test_gaps_are_those_that_overlap_a_time() -> None:
    assert gaps_s(TRACE, range(1), 0.0, 9.0) == [1.0, 0.5, 1.5]
    assert gaps_s(TRACE, range(1), 2.1, 2.4) == [0.5]
    assert gaps_s(TRACE, range(1), 2.1, 3.0) == [0.5, 1.5]


def test_a_spread_has_the_median_of_repeats() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)


def test_prompts_follow_their_seed_and_avoid_special_tokens() -> None:
    drawn = prompts(3, 50, 10, "one")
    assert drawn == prompts(3, 50, 10, "one") != prompts(3, 50, 10, "another")
    assert {len(prompt) for prompt in drawn} == {50}
    assert {token for prompt in drawn for token in prompt} == set(range(3, 10))


def test_a_step_of_a_batch_reads_the_weights_once() -> None:
    shape = SHAPES["135m"]
    assert weights_rate(shape, 8, 80.0, 2) == shape.step_parameters * 2 * 10


def test_the_limit_is_memory_at_small_batches_and_gemm_at_large_ones() -> None:
    shape, limits = SHAPES["135m"], Limits(memory=10e9, gemm_float32=1e11, gemm_bfloat16=2e11)
    one, many = (Work([[3] * 128] * batch, [64] * batch) for batch in (1, 1024))
    assert decode_limit(shape, one, limits, 2) == pytest.approx(10e9 / (2 * shape.step_parameters))
    rate = decode_limit(shape, many, limits, 2)
    assert decode_flops_rate(shape, many, rate) == pytest.approx(2e11)


def test_operations_of_a_shape_by_hand() -> None:
    shape = Shape("by hand", 8, 2, 4, 2, 16, 10, tied=False)
    layer = 8 * 8 + 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16
    assert shape.layer_parameters == 2 * layer
    assert shape.parameters == 2 * layer + 2 * 80
    assert shape.step_parameters == 2 * layer + 80
    # Prompts of 3 and 1 tokens: 4 tokens through the layers, 2 logits, attention over 9 / 2 and 1 / 2 pairs.
    assert shape.prefill_flops([3, 1]) == 2 * 2 * layer * 4 + 2 * 80 * 2 + 2 * 2 * 8 * (9 + 1)
    assert shape.decode_flops([5]) == 2 * (2 * layer + 80) + 4 * 2 * 8 * 5


def test_the_shapes_are_as_large_as_their_names_say() -> None:
    assert SHAPES["135m"].parameters == pytest.approx(135e6, rel=0.01)
    assert SHAPES["1.1b"].parameters == pytest.approx(1.1e9, rel=0.01)


def test_agreement_is_of_first_tokens() -> None:
    assert common_prefix([[1, 2], [3, 4]], [[1, 9], [5, 4]]) == 0.5


def test_no_two_points_of_a_contest_share_a_prompt() -> None:
    points = [Point(1, 128, 64), Point(32, 128, 64), Point(32, 128, 1), Point(1, 4096, 1)]
    works = [point.work(SHAPES["135m"], repeat) for point in points for repeat in (0, 1)]
    starts = [tuple(prompt[:16]) for work in works for prompt in work.prompts]
    assert len(set(starts)) == len(starts)
