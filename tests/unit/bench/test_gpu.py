"""What `bench.gpu` asks of an engine and of its peers, on a CPU: the figures mean nothing there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import gpu, gpu_plot
from bench.shapes import SHAPES, config_json
from engine import Engine

SHAPE = SHAPES["tiny"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config_json(SHAPE)))
    return tmp_path


def test_every_figure_of_an_engine_can_be_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LONG", 256)
    monkeypatch.setattr(gpu, "POINTS", ((1, 100), (4, 100), (200, 100)))
    limits = gpu.Limits(1e9, 1e9)
    options = {"load_format": "dummy", "dtype": "float32", "max_model_len": 4096, "max_running": 32}
    with Engine(str(folder), **options) as engine:  # type: ignore[arg-type]
        bench = gpu.Bench(engine, SHAPE)
        result = gpu.Result("tiny", "", 0.0)
        gpu._measure_decode(result, bench, SHAPE, limits, 100 * 400 * SHAPE.kv_bytes_per_token)
        assert [point["sequences"] for point in result.decode] == [1, 4]
        assert len(result.skipped) == 1
        assert all(point["tokens_per_s"] > 0 for point in result.decode)
        assert bench.first_token_s() > 0
        assert bench.longest_gap() > 0
        share, rate = bench.busy(0.5, lambda: 0.5)
        assert share == 0.5
        assert rate > 0
        assert not engine.busy


def test_a_step_that_brings_too_few_tokens_is_no_figure(folder: Path) -> None:
    with Engine(str(folder), load_format="dummy", max_running=2) as engine:
        bench = gpu.Bench(engine, SHAPE)
        bench.submit(1, 10, 8)
        bench.submit(1, 10, 80)
        with pytest.raises(RuntimeError, match="not 2"):
            bench._step_s(2)


def test_a_peer_is_measured_and_one_that_fails_says_why(folder: Path, tmp_path: Path) -> None:
    found = gpu.peers(SHAPE, str(folder), ["transformers"], [(2, 16)], "cpu", tmp_path / "logs")
    assert found[0]["tokens_per_s"] > 0  # type: ignore[operator]
    (failed,) = gpu.peers(
        SHAPE, str(folder), ["transformers"], [(2, 16)], "no such device", tmp_path / "logs"
    )
    assert "no such device" in str(failed["failed"])
    point = {"sequences": 2, "length": 16, "tokens_per_s": 5.0, "of_both_limits": 0.5}
    drawn = gpu_plot.draw([{"shape": "tiny", "decode": [point], "peers": found}], tmp_path / "plot.svg")
    assert drawn == (tmp_path / "plot.svg").exists()
