"""A whole measurement of a tiny model, with a process of each kind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import engine, limits, results
from bench.contest import Contestant, ContestantError, Entry
from bench.measures import Limits
from bench.protocol import Setup


def test_a_tiny_contest_writes_figures_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "measured", lambda *_: Limits(1e9, 1e9, 1e9))
    engine.main(
        "--shapes tiny --only phalanx transformers --batches 2 --prompt-tokens 8 --new-tokens 4 --repeats 1 "
        f"--prefill-tokens 32 --prefill-prompts 2 --threads 1 --cache {tmp_path} --docs {tmp_path}".split()
    )
    rows = results.load(tmp_path / "bench", "decode")["rows"]
    assert {row["contestant"] for row in rows} == {"phalanx", "transformers"}
    assert all(row["decode"]["median"] > 0 for row in rows)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "## Prefill" in text
    assert "transformers `generate`" in text


def test_limits_are_positive() -> None:
    measured = limits.measured(1, read_bytes=1 << 20, size=64)
    assert min(measured.memory, measured.gemm_float32, measured.gemm_bfloat16) > 0


def test_a_contestant_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    with pytest.raises(ContestantError, match="no config"):
        Contestant(Entry("phalanx"), Setup(str(tmp_path)), sys.executable, tmp_path / "log", 60)
