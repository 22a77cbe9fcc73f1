"""Traces of real traffic."""

from __future__ import annotations

import pytest

from bench.traffic import as_work, read_lengths

TRACE = [
    "TIMESTAMP,ContextTokens,GeneratedTokens\n",
    "2023-11-16 18:15:46.6805900,374,44\n",
    "2023-11-16 18:15:50.9951690,396,109\n",
    "2023-11-16 18:15:51.2224670,5,7\n",
]


def test_lengths_are_divided_and_at_least_1() -> None:
    assert read_lengths(TRACE, 3, 8) == [(46, 5), (49, 13), (1, 1)]


def test_only_the_first_requests_are_read() -> None:
    assert read_lengths(TRACE, 1, 1) == [(374, 44)]


def test_a_trace_that_is_too_short_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 requests, fewer than 4"):
        read_lengths(TRACE, 4, 8)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match="no column GeneratedTokens"):
        read_lengths(["TIMESTAMP,ContextTokens\n"], 1, 8)


def test_work_has_these_lengths_and_no_common_prefix() -> None:
    work = as_work([(20, 2), (20, 3)], vocab=1000, seed="traffic")
    assert [len(prompt) for prompt in work.prompts] == [20, 20]
    assert work.new_tokens == [2, 3]
    assert work.prompts[0][:4] != work.prompts[1][:4]
