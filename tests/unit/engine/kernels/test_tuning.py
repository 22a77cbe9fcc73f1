from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from engine.kernels.gpu.gemv import CANDIDATES, Tiles
from engine.kernels.gpu.tuning import Shape, Tuner

SHAPE = Shape(1, 4096, 4096, "bfloat16")


def times(fastest: Tiles | None, seconds: float) -> dict[Tiles | None, float]:
    return {None: 1.0, **dict.fromkeys(CANDIDATES, 2.0), fastest: seconds}


def test_the_fastest_is_chosen_and_measured_once(tmp_path: Path) -> None:
    measured: list[Tiles | None] = []

    def measure(tiles: Tiles | None) -> float:
        measured.append(tiles)
        return times(CANDIDATES[4], 0.5)[tiles]

    for _ in range(2):
        tuner = Tuner("gpu", tmp_path / "cache/file.json")
        assert tuner.choose(SHAPE, measure) == CANDIDATES[4]
        assert tuner.choose(SHAPE, measure) == CANDIDATES[4]
    assert len(measured) == len(set(measured)) == 1 + len(CANDIDATES)


def test_cublas_stays_where_nothing_is_clearly_faster() -> None:
    assert Tuner("gpu", None).choose(SHAPE, times(CANDIDATES[0], 0.98).__getitem__) is None


def test_no_part_is_left_without_columns() -> None:
    def measure(tiles: Tiles | None) -> float:
        assert tiles is None or tiles.splits == 1 or tiles.columns * tiles.splits <= 256
        return 1.0

    Tuner("gpu", None).choose(Shape(1, 64, 256, "float32"), measure)


@pytest.mark.parametrize("content", ["", "[]", '{"device": "gpu", "chosen": {"1x2x3 float32": [1]}}'])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "file.json").write_text(content)
    tuner = Tuner("gpu", tmp_path / "file.json")
    assert tuner.choose(SHAPE, times(CANDIDATES[2], 0.5).__getitem__) == CANDIDATES[2]
    assert json.loads((tmp_path / "file.json").read_text())["chosen"][SHAPE.key]["rows"] == CANDIDATES[2].rows


def test_what_another_gpu_measured_does_not_count(tmp_path: Path) -> None:
    Tuner("one", tmp_path / "file.json").choose(SHAPE, times(CANDIDATES[2], 0.5).__getitem__)
    assert Tuner("other", tmp_path / "file.json").choose(SHAPE, times(None, 0.1).__getitem__) is None


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("")
    tuner = Tuner("gpu", tmp_path / "folder/file.json")
    assert tuner.choose(SHAPE, times(CANDIDATES[2], 0.5).__getitem__) == CANDIDATES[2]
