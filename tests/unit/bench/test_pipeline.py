from __future__ import annotations

from pathlib import Path

import pytest

from bench import render, results
from bench.pipeline_spans import Span, busy_share, overlap_share, read


def span(rank: int, step: int, begin: int, end: int) -> Span:
    return Span(rank, step, 8, begin, end, 0)


SERIAL = [span(0, 1, 0, 10), span(1, 1, 10, 20), span(0, 2, 20, 30), span(1, 2, 30, 40)]
OVERLAPPING = [span(0, 1, 0, 10), span(0, 2, 10, 20), span(1, 1, 10, 20), span(1, 2, 20, 30)]


def test_stages_that_take_turns_do_not_overlap() -> None:
    assert overlap_share(SERIAL, 0, 1) == 0
    assert [busy_share(SERIAL, rank) for rank in (0, 1)] == [0.5, 0.5]


def test_overlap_is_when_both_compute_of_when_either_does() -> None:
    assert overlap_share(OVERLAPPING, 0, 1) == pytest.approx(1 / 3)
    assert busy_share(OVERLAPPING, 1) == pytest.approx(2 / 3)


def test_spans_are_read_in_order_of_time(tmp_path: Path) -> None:
    file = tmp_path / "spans"
    file.write_text("1 1 8 10 20 0\n0 1 8 0 10 0\n")
    assert read(file) == [span(0, 1, 0, 10), span(1, 1, 10, 20)]


def test_the_page_has_layouts_beside_one_rank_and_their_pictures(tmp_path: Path) -> None:
    point = {"shape": "tiny", "weights": "bfloat16", "batch": 16}
    rows: list[results.Row] = [
        {**point, "layout": "1x1", "decode": 10.0, "busy": [1.0], "overlap": None},
        {**point, "layout": "1x2", "decode": 16.0, "busy": [0.9, 0.8], "overlap": 0.7},
    ]
    machine, stamp = results.Machine("cpu", 2, "avx2", 8, "Linux"), results.Stamp("2026-01-01", "abc")
    results.save(tmp_path / "bench", "layouts", rows, machine, stamp)
    render.write(tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| TP1 PP2 (tiny) | bfloat16 | 16 | 16.0 | 1.60× | 90%, 80% | 70% |" in page
    assert "(pipeline-tiny-1x2.svg)" in page
