"""A rank's place in the grid, and the weights that it holds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.grid import Grid
from engine.kernels.interface import Matrix
from engine.kernels.reference import ReferenceKernels, ReferenceMatrix
from engine.weights.loader import load_weights
from engine.weights.model_config import ModelConfig
from engine.weights.stage_weights import Mlp, StageWeights
from tests.engine.conftest import MakeModel

KERNELS = ReferenceKernels(torch.device("cpu"), torch.float32)


def load(model: Path, grid: Grid) -> StageWeights:
    return load_weights(str(model), ModelConfig.load(model), grid, KERNELS)


def values(matrix: Matrix | None) -> torch.Tensor:
    assert isinstance(matrix, ReferenceMatrix)
    return matrix.weight


def test_tp_rank_counts_fastest() -> None:
    places = [(Grid(3, 2, rank).pp_rank, Grid(3, 2, rank).tp_rank) for rank in range(6)]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [Grid(3, 2, rank).is_last_stage for rank in range(6)] == [False] * 3 + [True] * 3
    assert Grid(3, 2, 0).sampling_rank == 3


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_tensor_parallel_ranks_hold_each_weight_once(model_dir: Path, tp: int) -> None:
    """8 query heads over 4 KV heads: with 8 ranks, two ranks hold each KV head."""
    config = ModelConfig.load(model_dir)
    files = load_file(model_dir / "model.safetensors")
    stages = [load(model_dir, Grid(tp, 1, r)) for r in range(tp)]
    mlps = [stage.layers[2].mlp for stage in stages]
    layer = "model.layers.2."
    q, kv = config.num_heads // tp * config.head_dim, max(1, config.num_kv_heads // tp) * config.head_dim
    parts = [torch.split(values(stage.layers[2].qkv.weight), [q, kv, kv]) for stage in stages]
    ranks_per_kv_head = max(1, tp // config.num_kv_heads)
    assert torch.equal(torch.cat([part[0] for part in parts]), files[f"{layer}self_attn.q_proj.weight"])
    for i, name in ((1, "k_proj"), (2, "v_proj")):
        stored = torch.cat([part[i] for part in parts[::ranks_per_kv_head]])
        assert torch.equal(stored, files[f"{layer}self_attn.{name}.weight"])
        assert all(torch.equal(part[i], parts[r - r % ranks_per_kv_head][i]) for r, part in enumerate(parts))
    out = torch.cat([values(stage.layers[2].out.weight) for stage in stages], dim=1)
    assert torch.equal(out, files[f"{layer}self_attn.o_proj.weight"])
    halves = [values(mlp.gate_up.weight).chunk(2) for mlp in mlps if isinstance(mlp, Mlp)]
    assert torch.equal(torch.cat([gate for gate, _ in halves]), files[f"{layer}mlp.gate_proj.weight"])
    assert torch.equal(torch.cat([up for _, up in halves]), files[f"{layer}mlp.up_proj.weight"])
    head = torch.cat([values(stage.head) for stage in stages])
    assert torch.equal(head[: config.vocab_size], files["lm_head.weight"])


def test_only_the_ends_of_the_pipeline_hold_the_vocabulary(model_dir: Path) -> None:
    stages = [load(model_dir, Grid(1, 3, r)) for r in range(3)]
    vocabulary = [
        {f.name for f in fields(s) if f.name != "layers" and getattr(s, f.name) is not None} for s in stages
    ]
    assert vocabulary == [{"embedding"}, set(), {"final_norm", "head"}]
    assert [len(stage.layers) for stage in stages] == [2, 1, 1]


def test_a_vocabulary_that_does_not_divide_is_filled_up_with_zeros(make_model: MakeModel) -> None:
    model = make_model(vocab_size=321, num_hidden_layers=1)
    head = values(load(model, Grid(2, 1, 1)).head)
    assert head.shape[0] == 161
    assert not head[160].any()


def test_tied_embeddings_are_held_once(make_model: MakeModel) -> None:
    model = make_model(tie_word_embeddings=True, num_hidden_layers=1)
    stage = load(model, Grid(1, 1, 0))
    assert stage.head is stage.embedding
