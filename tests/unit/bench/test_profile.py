from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import profile
from bench.annotated import PREFIX


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, correlation: int = 0) -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": {"correlation": correlation}}


def test_a_kernel_belongs_to_the_stage_that_launched_it_whenever_it_runs() -> None:
    events = [
        event("user_annotation", PREFIX + "linear", 0, 10),
        event("user_annotation", PREFIX + "attention", 10, 10),
        event("cuda_runtime", "cudaLaunchKernel", 5, 1, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 12, 1, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 30, 1, correlation=3),
        event("kernel", "gemv", 100, 4, tid=7, correlation=1),
        event("kernel", "decode", 110, 2, tid=7, correlation=2),
        event("kernel", "fill", 120, 2, tid=7, correlation=3),
        {"cat": "user_annotation", "name": "an instant", "ts": 3},
    ]
    found = profile.lines(events, {"linear": 8000, "attention": 1000}, on_device=True)
    assert [(line.stage, line.kernel, line.share) for line in found] == [
        ("linear", "gemv", 0.5),
        ("attention", "decode", 0.25),
        (profile.OTHERS, "fill", 0.25),
    ]
    assert [round(line.rate) for line in found] == [2_000_000_000, 500_000_000, 0]


def test_a_trace_of_a_gpu_without_kernels_is_no_profile() -> None:
    with pytest.raises(ValueError, match="no kernels"):
        profile.lines([event("user_annotation", PREFIX + "linear", 0, 10)], {}, on_device=True)


def test_the_stages_of_a_small_engine_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"profile --shape tiny --device cpu --batch 2 --length 20 --steps 3 --report {tmp_path}"
    monkeypatch.setattr("sys.argv", options.split())
    profile.main()
    rows = json.loads((tmp_path / "table.json").read_text())
    stages = {row["stage"].partition(",")[0] for row in rows}
    assert {"attention", "add and norm", "embed", "sample"} <= stages
    attention = next(row for row in rows if row["stage"] == "attention, 2 rows")
    assert attention["calls"] == 3 * 2, "steps and layers"
    assert attention["rate"] > 0
    assert "GB/s" in capsys.readouterr().out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
