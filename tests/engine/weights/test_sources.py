"""Weights from files, from per-rank files and from random numbers; errors name the tensor and the file."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.grid import Grid
from engine.kernels.reference import ReferenceKernels, ReferenceMatrix
from engine.weights.check_model import check_model
from engine.weights.dummy_source import DummySource
from engine.weights.file_source import FileSource
from engine.weights.identity import engine_identity, model_hash
from engine.weights.loader import load_weights
from engine.weights.locate import check_weights, find_tensors
from engine.weights.manifest import MANIFEST, shard_name
from engine.weights.model_config import ModelConfig
from engine.weights.shard_model import shard_model
from engine.weights.stage_weights import StageWeights
from engine.weights.tensors import rank_slices
from tests.engine.conftest import MakeModel
from tests.engine.execution.test_architectures import QWEN3_MOE

KERNELS = ReferenceKernels(torch.device("cpu"), torch.float32)
UP = "model.layers.1.mlp.up_proj.weight"
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (8, 1)]


def weights_of(stage: StageWeights) -> list[torch.Tensor]:
    matrices = [matrix for matrix in stage.matrices if isinstance(matrix, ReferenceMatrix)]
    assert len(matrices) == len(stage.matrices)
    return [matrix.weight for matrix in matrices]


def load(model: Path, grid: Grid, load_format: str = "auto") -> list[torch.Tensor]:
    return weights_of(
        load_weights(str(model), ModelConfig.load(model), grid, KERNELS, load_format=load_format)
    )


@pytest.fixture(scope="module")
def moe(make_model: MakeModel) -> Path:
    """Experts, a dense layer, head norms, biases, and a vocabulary that two ranks cannot share evenly."""
    fields = QWEN3_MOE | {"mlp_only_layers": [1], "attention_bias": True, "vocab_size": 321}
    return make_model(family="Qwen3Moe", num_hidden_layers=2, **fields)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_a_sharded_model_is_what_its_source_is(moe: Path, tmp_path: Path, tp: int, pp: int) -> None:
    sharded = tmp_path / "sharded"
    paths = shard_model(moe, sharded, tp, pp)
    assert [path.name for path in paths] == [shard_name(Grid(tp, pp, rank)) for rank in range(tp * pp)]
    for rank in range(tp * pp):
        alone = tmp_path / f"host{rank}"  # has only the file of this rank
        shutil.copytree(sharded, alone, ignore=lambda _, names: {n for n in names if n.startswith("pp")})
        shutil.copy(paths[rank], alone)
        grid = Grid(tp, pp, rank)
        assert all(map(torch.equal, load(alone, grid), load(moe, grid)))
        assert model_hash(alone) == model_hash(moe)
        check_weights(alone, tp, pp)


def test_a_sharded_model_loads_in_its_own_layout_only(model_dir: Path, tmp_path: Path) -> None:
    shard_model(model_dir, tmp_path / "sharded", 2, 1)
    with pytest.raises(ModelError, match="sharded for TP 2 and PP 1, not for TP 1 and PP 2") as caught:
        check_weights(tmp_path / "sharded", 1, 2)
    assert caught.value.reason == "INVALID_LAYOUT"


def test_a_rank_misses_its_file(model_dir: Path, tmp_path: Path) -> None:
    paths = shard_model(model_dir, tmp_path / "sharded", 2, 1)
    paths[1].unlink()
    check_weights(tmp_path / "sharded", 2, 1, rank=0)
    with pytest.raises(ModelError, match=r"lacks pp0_tp1\.safetensors"):
        check_weights(tmp_path / "sharded", 2, 1, rank=1)


def test_a_file_of_another_model_is_not_taken(make_model: MakeModel, model_dir: Path, tmp_path: Path) -> None:
    paths = shard_model(model_dir, tmp_path / "sharded", 2, 1)
    other = shard_model(make_model(rms_norm_eps=0.1, attention_bias=False), tmp_path / "other", 2, 1)
    shutil.copy(other[0], paths[1])
    with pytest.raises(ModelError, match="is not the file that the manifest"):
        check_weights(tmp_path / "sharded", 2, 1)


def test_sharding_refuses_what_it_cannot_do(model_dir: Path, tmp_path: Path) -> None:
    shard_model(model_dir, tmp_path / "sharded", 2, 1)
    with pytest.raises(ModelError, match="is not an empty directory"):
        shard_model(model_dir, tmp_path / "sharded", 2, 1)
    with pytest.raises(ModelError, match="is sharded already"):
        shard_model(tmp_path / "sharded", tmp_path / "again", 1, 1)
    with pytest.raises(ModelError, match="does not divide"):
        shard_model(model_dir, tmp_path / "third", 3, 1)
    assert not (tmp_path / "third").exists()


def test_a_manifest_of_another_format_is_refused(model_dir: Path, tmp_path: Path) -> None:
    shard_model(model_dir, tmp_path / "sharded", 1, 1)
    (tmp_path / "sharded" / MANIFEST).write_text(json.dumps({"format": 2}))
    with pytest.raises(ModelError, match="is not a manifest of format 1"):
        check_weights(tmp_path / "sharded")


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_random_weights_agree_in_every_layout(moe: Path, tp: int, pp: int) -> None:
    config, source = ModelConfig.load(moe), DummySource()
    whole = {name: source.read(part) for name, part in rank_slices(config, Grid(1, 1, 0)).items()}
    for rank in range(tp * pp):
        for name, part in rank_slices(config, Grid(tp, pp, rank)).items():
            columns = slice(None) if part.columns is None else slice(part.columns.start, part.columns.stop)
            rows = whole[name][part.rows.start : part.rows.stop]
            assert torch.equal(source.read(part), rows if rows.ndim == 1 else rows[:, columns])


def test_random_weights_need_nothing_but_the_configuration(moe: Path, tmp_path: Path) -> None:
    shutil.copy(moe / "config.json", tmp_path)
    stages = [load(tmp_path, Grid(1, 1, 0), "dummy") for _ in range(2)]
    assert all(map(torch.equal, *stages))
    assert all(weight.isfinite().all() and weight.std() > 0 for weight in stages[0])
    assert model_hash(tmp_path, dummy=True) == model_hash(tmp_path, dummy=True)
    config = ModelConfig.load(tmp_path)
    identities = {
        engine_identity(EngineConfig(str(tmp_path), load_format="dummy", **fields), config)
        for fields in ({}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"tp": 2})
    }
    assert len(identities) == 3  # a layout does not change the identity


def test_random_weights_spread_as_trained_ones_do(moe: Path) -> None:
    part = rank_slices(ModelConfig.load(moe), Grid(1, 1, 0))["model.embed_tokens.weight"]
    values = DummySource().read(part)
    assert values.std().item() == pytest.approx(part.whole[1] ** -0.5, rel=0.02)
    assert abs(values.mean().item()) < 0.002


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("-inf"), "infinite")])
def test_a_value_that_is_no_number_is_named_with_its_place(
    model_dir: Path, tmp_path: Path, value: float, kind: str
) -> None:
    model = damaged(
        model_dir, tmp_path, UP, lambda tensor: tensor.index_put_((tens(70), tens(5)), tens(value))
    )
    message = f"{UP} in {model / 'model.safetensors'} is {kind} at \\[70, 5\\]"
    with pytest.raises(ModelError, match=message):
        check_model(model, values=True)
    config, second = ModelConfig.load(model), Grid(2, 1, 1)
    with pytest.raises(ModelError, match=message):
        load_weights(str(model), config, second, KERNELS, check=True)
    load_weights(str(model), config, Grid(2, 1, 0), KERNELS, check=True)  # rank 0 does not read that row
    load_weights(str(model), config, second, KERNELS)
    assert check_model(model) == ()


def test_columns_count_from_the_whole_tensor(model_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    model = damaged(model_dir, tmp_path, name, lambda tensor: tensor.fill_(torch.nan))
    with pytest.raises(ModelError, match=r"is NaN at \[0, 48\]"):
        load_weights(str(model), ModelConfig.load(model), Grid(2, 1, 1), KERNELS, check=True)


def test_tensors_of_no_use_are_named_and_left(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = damaged(model_dir, tmp_path, UP, lambda tensor: tensor)
    file = model / "model.safetensors"
    more = {"extra.weight": torch.zeros(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(load_file(file) | more, file)
    with caplog.at_level(logging.WARNING):
        load(model, Grid(1, 1, 0))
    assert [record.message for record in caplog.records] == [
        f"{model}: no part of the model and not loaded: extra.weight"
    ]
    assert check_model(model) == ("extra.weight",)


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(model_dir: Path, tmp_path: Path) -> None:
    model = damaged(model_dir, tmp_path, UP, lambda tensor: tensor)
    config, grid = ModelConfig.load(model), Grid(1, 1, 0)
    tensors = find_tensors(model, config, grid).stored
    last = max(tensors, key=lambda name: tensors[name].offset)
    file = model / "model.safetensors"
    with file.open("r+b") as data:
        data.truncate(file.stat().st_size - 1)
    with FileSource(tensors) as source, pytest.raises(ModelError, match=f"{last} ends before"):
        source.read(rank_slices(config, grid)[last])


def test_slices_of_slices_are_read(model_dir: Path, tmp_path: Path) -> None:
    """A rank's file may hold more than is asked for."""
    name = "model.layers.0.mlp.down_proj.weight"
    config = ModelConfig.load(model_dir)
    (path,) = shard_model(model_dir, tmp_path / "sharded", 1, 1)
    whole = load_file(path)[name]
    stored = find_tensors(tmp_path / "sharded", config, Grid(1, 1, 0)).stored
    part = rank_slices(config, Grid(4, 1, 3))[name]
    assert part.columns is not None
    with FileSource(stored) as source:
        assert torch.equal(source.read(part), whole[:, part.columns.start : part.columns.stop])


def tens(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def damaged(model_dir: Path, tmp_path: Path, name: str, change: object) -> Path:
    """A copy of a model with one tensor changed."""
    assert callable(change)
    model = tmp_path / "damaged"
    shutil.copytree(model_dir, model)
    tensors = load_file(model / "model.safetensors")
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, model / "model.safetensors")
    return model
