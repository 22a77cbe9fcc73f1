from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.grid import Grid
from engine.kernels.reference import ReferenceKernels
from engine.weights.checkpoint import weight_files
from engine.weights.loader import load_weights
from engine.weights.locate import check_weights
from engine.weights.model_config import ModelConfig
from engine.weights.tensors import tensor_shapes
from tests.engine.conftest import MakeModel
from tests.engine.harness import Harness

PROMPT = [5, 17, 200, 31, 8]
MIB = 1 << 20
KERNELS = ReferenceKernels(torch.device("cpu"), torch.float32)


def test_three_shards_hold_what_one_file_holds(make_model: MakeModel, model_dir: Path) -> None:
    sharded = make_model(shards=3)
    assert len(weight_files(sharded)) == 3
    check_weights(sharded)
    assert torch.equal(Harness(sharded).step({0: PROMPT})[0], Harness(model_dir).step({0: PROMPT})[0])


def test_progress_goes_up_to_1(model_dir: Path) -> None:
    reported: list[float] = []
    load_weights(str(model_dir), ModelConfig.load(model_dir), Grid(1, 1, 0), KERNELS, reported.append)
    assert reported == sorted(reported)
    assert reported[-1] == 1.0


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """180 MiB of bfloat16 in one file."""
    directory = tmp_path_factory.mktemp("large")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(ModelConfig.load(directory))
    save_file(
        {k: torch.zeros(v, dtype=torch.bfloat16) for k, v in shapes.items()}, directory / "model.safetensors"
    )
    return directory


MEASURE = """
import ctypes, gc, json, re, sys, torch
from pathlib import Path
from engine.weights.model_config import ModelConfig
from engine.grid import Grid
from engine.kernels.choose import choose_kernels
from engine.weights.loader import load_weights

def peak_rss_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

model, grids = sys.argv[1], json.loads(sys.argv[2])
kernels = choose_kernels(torch.device("cpu"), torch.bfloat16)
for grid in grids:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else a load reuses freed memory, and no peak shows
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = peak_rss_kib()
    stage = load_weights(model, ModelConfig.load(model), Grid(*grid), kernels)
    print(peak_rss_kib() - before)
    del stage
"""


def test_peak_memory_of_a_load_is_about_the_rank_s_share(large_model: Path) -> None:
    """In a process of its own, where nothing else moves the peak."""
    grids = [(1, 1, 0), (2, 2, 0), (2, 2, 3)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large_model), json.dumps(grids)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    size = (large_model / "model.safetensors").stat().st_size
    for (tp, pp, rank), kib in zip(grids, done.stdout.split(), strict=True):
        peak, share = int(kib) / 1024, size / (tp * pp) / MIB
        assert 0.7 * share < peak < 1.3 * share + 40, f"rank {rank}: {peak:.0f} MiB, share {share:.0f} MiB"
