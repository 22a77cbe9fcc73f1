"""The measurements of `bench.gpu`, run on a CPU with a tiny model: only the code is tested, not the speed."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from bench import gpu, gpu_plot
from bench.shapes import SHAPES, Shape, config_json
from engine import Engine

SHAPE = SHAPES["tiny"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config_json(SHAPE)))
    return tmp_path


@contextmanager
def engine_on_a_cpu(shape: Shape, quantization: str, **options: Any) -> Iterator[tuple[gpu.Bench, int]]:
    options = {"load_format": "dummy", "dtype": "float32", "max_model_len": 4096, "max_running": 32}
    with TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(config_json(shape)))
        with Engine(name, **options) as engine:
            yield gpu.Bench(engine, shape), 100 * 400 * shape.kv_bytes_per_token
            assert not engine.busy


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "engine_of", engine_on_a_cpu)
    monkeypatch.setattr(gpu, "driver_utilisation", lambda: lambda: 0.5)
    monkeypatch.setattr(gpu, "LONG", 256)
    monkeypatch.setattr(gpu, "BUSY_S", 0.5)
    monkeypatch.setattr(gpu, "POINTS", ((1, 100), (4, 100), (500, 100)))


LIMITS = gpu.Limits(1e9, 1e9)


@pytest.mark.usefixtures("on_a_cpu")
def test_batches_that_fit_are_held_against_the_limits() -> None:
    *_, found = gpu.decode(SHAPE, LIMITS, "")
    assert [point["sequences"] for point in found["decode"]] == [1, 4]
    assert len(found["skipped"]) == 1
    assert all(point["tokens_per_s"] > 0 for point in found["decode"])


@pytest.mark.usefixtures("on_a_cpu")
def test_what_users_see_is_told_piece_by_piece() -> None:
    pieces = list(gpu.serve(SHAPE, LIMITS, ""))
    assert all(value > 0 for piece in pieces for value in piece.values())
    assert pieces[-1]["busy"] == 0.5
    assert len(pieces) == 3


@pytest.mark.usefixtures("on_a_cpu")
def test_a_part_is_written_as_soon_as_it_is_found(tmp_path: Path) -> None:
    report = gpu.Report(tmp_path / "gpu.json", "one", LIMITS)
    options = Namespace(quantization="int8", peers=["transformers"])
    known = gpu.run("serve", SHAPE, LIMITS, report, options)
    assert json.loads((tmp_path / "gpu.json").read_text())["results"] == [known]
    assert gpu.run("peers", SHAPE, LIMITS, report, options) == {}


def test_a_step_reads_or_multiplies_its_weights_whichever_takes_longer_and_then_reads_the_cache() -> None:
    weights, cached = SHAPE.step_parameters * 2, 8 * 100 * SHAPE.kv_bytes_per_token
    flops = 2 * SHAPE.step_parameters * 8
    reading = gpu.held_against(SHAPE, gpu.Limits(1.0, float(flops)), "", 8, 100, 2.0 * (weights + cached))
    assert reading["of_both_limits"] == pytest.approx(0.5)
    assert reading["of_copy"] == pytest.approx(0.5)
    assert reading["tokens_per_s"] == pytest.approx(4 / (weights + cached))
    multiplying = gpu.held_against(SHAPE, gpu.Limits(float(cached), 1.0), "", 8, 100, 2.0 * (flops + 1))
    assert multiplying["of_both_limits"] == pytest.approx(0.5)


def test_a_report_keeps_what_the_same_gpu_had_and_compares(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    point = {"sequences": 2, "length": 16, "tokens_per_s": 6.0, "of_both_limits": 0.5}
    gpu.Report(path, "one", LIMITS).add("tiny", "", {"decode": [point], "skipped": []})
    peers = [
        {"name": "a", "sequences": 2, "length": 16, "tokens_per_s": 2.0},
        {"name": "b", "sequences": 2, "length": 16, "failed": "why"},
        {"name": "a", "sequences": 3, "length": 16, "tokens_per_s": 2.0},
    ]
    known = gpu.Report(path, "one", LIMITS).add("tiny", "", {"peers": peers})
    assert known["decode"] == [point]
    assert known["times_of_peers"] == {"a, 2 x 16": 3.0}
    again = {"name": "a", "sequences": 2, "length": 16, "tokens_per_s": 3.0}
    known = gpu.Report(path, "one", LIMITS).add("tiny", "", {"peers": [again]})
    assert known["peers"] == [again, *peers[1:]]
    assert known["times_of_peers"] == {"a, 2 x 16": 2.0}
    gpu.Report(path, "one", LIMITS).add("tiny", "int8", {"busy": 0.5})
    assert [one["quantization"] for one in json.loads(path.read_text())["results"]] == ["", "int8"]
    gpu.Report(path, "another", LIMITS).add("tiny", "", {"busy": 0.5})
    (only,) = json.loads(path.read_text())["results"]
    assert "decode" not in only


def test_a_step_that_brings_too_few_tokens_is_no_figure(folder: Path) -> None:
    with Engine(str(folder), load_format="dummy", max_running=2) as engine:
        bench = gpu.Bench(engine, SHAPE)
        bench.submit(1, 10, 8)
        bench.submit(1, 10, 80)
        with pytest.raises(RuntimeError, match="not 2"):
            bench._step_s(2)


def test_a_peer_is_measured_and_one_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "NEW_TOKENS", 8)
    *_, found = gpu.peers(SHAPE, ["transformers"], [(2, 16)], "cpu", tmp_path / "logs")
    (point,) = found["peers"]
    assert point["tokens_per_s"] > 0
    assert "transformers" in point["what"]
    *_, found = gpu.peers(SHAPE, ["transformers"], [(2, 16)], "no such device", tmp_path / "logs")
    (failed,) = found["peers"]
    assert "no such device" in failed["failed"]
    ours = {"sequences": 2, "length": 16, "tokens_per_s": 5.0, "of_both_limits": 0.5}
    results = [{"shape": "tiny", "decode": [ours], "peers": [point, failed]}, {"shape": "other"}]
    drawn = gpu_plot.draw(results, tmp_path / "plot.svg")
    assert drawn == (tmp_path / "plot.svg").exists()
