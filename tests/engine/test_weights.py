from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint import weight_files
from engine.config import ModelConfig, check_weights, tensor_shapes
from engine.parallel import Grid
from engine.weights import load_weights
from tests.engine.conftest import MakeModel
from tests.engine.harness import Harness

PROMPT = [5, 17, 200, 31, 8]
MIB = 1 << 20


def reference_logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0, -1]


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 24, "num_key_value_heads": 1},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    ],
    ids=["tied", "biases", "head size", "llama3 rope", "linear rope"],
)
def test_variants_of_llama_have_the_logits_of_transformers(
    make_model: MakeModel, fields: dict[str, Any]
) -> None:
    model = make_model(**fields)
    torch.testing.assert_close(
        Harness(model).step({0: PROMPT})[0], reference_logits(model), rtol=1e-4, atol=1e-4
    )


def test_three_shards_hold_what_one_file_holds(make_model: MakeModel, model_dir: Path) -> None:
    sharded = make_model(shards=3)
    assert len(weight_files(sharded)) == 3
    check_weights(sharded)
    assert torch.equal(Harness(sharded).step({0: PROMPT})[0], Harness(model_dir).step({0: PROMPT})[0])


def test_progress_goes_up_to_1(model_dir: Path) -> None:
    told: list[float] = []
    load_weights(
        str(model_dir),
        ModelConfig.load(model_dir),
        Grid(1, 1, 0),
        torch.float32,
        torch.device("cpu"),
        told.append,
    )
    assert told == sorted(told)
    assert told[-1] == 1.0


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


@pytest.mark.parametrize("grid", [(1, 1, 0), (2, 2, 0), (2, 2, 3)], ids=str)
def test_peak_memory_is_about_the_share(large_model: Path, grid: tuple[int, int, int]) -> None:
    script = f"""
        import re, torch
        from pathlib import Path
        from engine.config import ModelConfig
        from engine.parallel import Grid
        from engine.weights import load_weights
        from engine.weights import safe_open
        model = {str(large_model)!r}
        with safe_open(Path(model) / "model.safetensors", framework="pt") as file:
            file.get_slice("model.norm.weight")[:4]

        def kib(field):
            return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

        Path("/proc/self/clear_refs").write_text("5")
        before = kib("VmHWM")
        stage = load_weights(model, ModelConfig.load(model), Grid{grid}, torch.bfloat16, torch.device("cpu"))
        print(kib("VmHWM") - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    peak = int(done.stdout) * 1024
    share = (large_model / "model.safetensors").stat().st_size / (grid[0] * grid[1])
    assert 0.7 * share < peak < 1.3 * share + 40 * MIB, (
        f"{peak / MIB:.0f} MiB for a share of {share / MIB:.0f} MiB"
    )
