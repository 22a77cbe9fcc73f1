"""Smaller layouts of a model: every one that the model can run in, the largest first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.grid import Grid
from engine.weights.layouts import max_rank_weights, smaller_layouts, smaller_sizes
from engine.weights.manifest import Manifest, write_manifest
from engine.weights.model_config import ModelConfig
from engine.weights.tensors import tensor_shapes

RAW = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def model(directory: Path, **changes: object) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(RAW | changes))
    return ModelConfig.load(directory)


def sizes(directory: Path, config: ModelConfig, tp: int, pp: int) -> list[tuple[int, int]]:
    return [(layout.tp, layout.pp) for layout in smaller_layouts(directory, config, tp, pp)]


def test_layouts_of_more_ranks_come_first_and_of_these_the_more_tensor_parallel(tmp_path: Path) -> None:
    assert sizes(tmp_path, model(tmp_path), 4, 2) == [(4, 1), (2, 2), (2, 1), (1, 2), (1, 1)]
    assert sizes(tmp_path, model(tmp_path), 2, 2) == [(2, 1), (1, 2), (1, 1)]
    assert sizes(tmp_path, model(tmp_path), 1, 1) == []


def test_a_layout_that_the_model_cannot_run_in_is_left_out(tmp_path: Path) -> None:
    config = model(tmp_path, num_attention_heads=6, num_key_value_heads=3, hidden_size=48)
    assert (6, 2) in smaller_sizes(6, 3)
    assert (2, 1) not in sizes(tmp_path, config, 6, 2), "3 KV heads are no multiple of 2 ranks"


def test_a_sharded_directory_has_its_one_layout(tmp_path: Path) -> None:
    config = model(tmp_path)
    write_manifest(tmp_path, Manifest(2, 2, "digest", {}))
    assert smaller_layouts(tmp_path, config, 2, 2) == ()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3)])
def test_the_weights_of_a_rank_are_what_it_loads(tmp_path: Path, tp: int, pp: int, tied: bool) -> None:
    config = model(tmp_path, tie_word_embeddings=tied)
    held = [_numbers(config, Grid(tp, pp, rank)) for rank in range(tp * pp)]
    vectors = config.hidden_size * (2 * config.num_layers + 1)
    assert max(held) - vectors <= max_rank_weights(config, tp, pp) <= max(held)


def _numbers(config: ModelConfig, grid: Grid) -> int:
    from math import prod

    from engine.weights.stages import stage_layers

    layers = stage_layers(config, grid)
    total = 0
    for name, shape in tensor_shapes(config).items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) in layers:
                total += prod(shape) // (grid.tp if len(shape) == 2 else 1)
        elif name == "model.norm.weight":
            total += prod(shape) if grid.pp_rank == grid.pp - 1 else 0
        elif name == "model.embed_tokens.weight":
            first, last = grid.pp_rank == 0, grid.pp_rank == grid.pp - 1
            total += prod(shape) // grid.tp * (1 if first or (config.tied_embeddings and last) else 0)
        else:
            total += prod(shape) // grid.tp if grid.pp_rank == grid.pp - 1 else 0
    return total
