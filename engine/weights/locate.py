"""Finds a rank's tensors in a model directory, and checks them by the files' headers. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.grid import Grid
from engine.weights.checkpoint import invalid_model, weight_files, weights_digest
from engine.weights.fused_experts import split_fused_experts
from engine.weights.manifest import Manifest, check_shards, read_manifest, shard_name
from engine.weights.model_config import ModelConfig
from engine.weights.safetensors_header import StoredTensor, read_header
from engine.weights.tensors import HEAD, TensorSlice, rank_slices

_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class RankTensors:
    """Every tensor that a rank needs, by name, and names in the files that are no tensors of the model."""

    stored: Mapping[str, StoredTensor]
    unknown_names: tuple[str, ...]


def find_tensors(model_dir: str | Path, config: ModelConfig, grid: Grid) -> RankTensors:
    """The tensors of one rank, all present, complete and of the right shape.

    In an ordinary directory this checks all tensors of the model, in a sharded one those in the rank's file.

    Raises:
        ModelError: INVALID_MODEL, naming the file and tensor; INVALID_LAYOUT, when the directory was
            sharded for another layout.
    """
    manifest = read_manifest(model_dir)
    if manifest is not None:
        check_shards(model_dir, manifest, grid.tp, grid.pp)
        path = Path(model_dir) / shard_name(grid)
        _check_shard(path, manifest)
        return _rank_tensors(model_dir, read_header(path), rank_slices(config, grid), config)
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(model_dir):
        stored.update(read_header(path))
    whole_tensors = {
        name: TensorSlice(name, part.whole, range(part.whole[0]))
        for name, part in rank_slices(config, Grid(1, 1, 0)).items()
    }
    return _rank_tensors(model_dir, split_fused_experts(config, stored), whole_tensors, config)


def check_weights(model_dir: str | Path, tp: int = 1, pp: int = 1, rank: int | None = None) -> None:
    """Check by the files' headers that every tensor is present, complete and of the right shape.

    Args:
        model_dir: an ordinary or a sharded model.
        tp: tensor parallel ranks per stage.
        pp: pipeline stages.
        rank: check what this rank needs. None: in a sharded model, check the files that this host has.

    Raises:
        ModelError: INVALID_MODEL, naming the file or tensor; INVALID_LAYOUT.
    """
    config = ModelConfig.load(model_dir)
    manifest = read_manifest(model_dir)
    grids = [Grid(tp, pp, each) for each in (range(tp * pp) if rank is None else [rank])]
    if manifest is None:
        find_tensors(model_dir, config, grids[0])
        return
    check_shards(model_dir, manifest, tp, pp)
    for grid in grids:
        if rank is not None or (Path(model_dir) / shard_name(grid)).is_file():
            find_tensors(model_dir, config, grid)


def _check_shard(path: Path, manifest: Manifest) -> None:
    if not path.is_file():
        raise invalid_model(f"{path.parent} lacks {path.name}, which holds this rank's weights")
    read_header(path)  # before the digest: its error says that a file is cut short
    if weights_digest([path]) != manifest.files.get(path.name):
        raise invalid_model(f"{path} is not the file that the manifest beside it was written with")


def _rank_tensors(
    model_dir: str | Path,
    stored: Mapping[str, StoredTensor],
    slices: Mapping[str, TensorSlice],
    config: ModelConfig,
) -> RankTensors:
    tensors = {}
    for name, part in slices.items():
        tensor = stored.get(name)
        if tensor is None:
            raise invalid_model(f"{model_dir} has no tensor {name}")
        if tensor.shape != part.shape:
            raise invalid_model(
                f"{name} in {tensor.path} has the shape {list(tensor.shape)}, expected {list(part.shape)}"
            )
        if tensor.dtype not in _DTYPES:
            raise invalid_model(
                f"{name} in {tensor.path} has the dtype {tensor.dtype}, which is not supported"
            )
        first_column = 0 if part.columns is None else part.columns.start
        tensors[name] = replace(tensor, first_row=part.rows.start, first_column=first_column)
    unknown = (name for name in stored.keys() - slices.keys() if _is_worth_a_warning(name, config))
    return RankTensors(tensors, tuple(sorted(unknown)))


def _is_worth_a_warning(name: str, config: ModelConfig) -> bool:
    """False for tensors that old checkpoints store although they follow from the rest."""
    return not (name.endswith("rotary_emb.inv_freq") or (name == HEAD and config.tied_embeddings))
