"""Finds a rank's tensors in a model directory, and says by name what is wrong with them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.grid import Grid
from engine.weights.checkpoint import Entry, invalid_model, read_header, weight_files, weights_digest
from engine.weights.manifest import Manifest, check_shards, read_manifest, shard_name
from engine.weights.model_config import ModelConfig
from engine.weights.tensors import HEAD, Slice, defuse, rank_slices

_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor's bytes, and which slice of the tensor they are."""

    entry: Entry
    part: Slice


@dataclass(frozen=True, slots=True)
class Found:
    """Every tensor that a rank needs, and names in the files that belong to no tensor of the model."""

    tensors: Mapping[str, Located]
    unknown: tuple[str, ...]


def find_tensors(model_dir: str | Path, config: ModelConfig, grid: Grid) -> Found:
    """The tensors of one rank, all of them there, whole and of the right shape.

    Of an ordinary directory all tensors of the model are looked at, of a sharded one the rank's file.

    Raises:
        ModelError: INVALID_MODEL, naming the file and tensor; INVALID_LAYOUT, when the directory was
            sharded for another layout.
    """
    manifest = read_manifest(model_dir)
    if manifest is not None:
        check_shards(model_dir, manifest, grid.tp, grid.pp)
        path = Path(model_dir) / shard_name(grid)
        _check_shard(path, manifest)
        return _found(model_dir, read_header(path), rank_slices(config, grid), config)
    entries: dict[str, Entry] = {}
    for path in weight_files(model_dir):
        entries.update(read_header(path))
    everything = {
        name: Slice(name, part.whole, range(part.whole[0]))
        for name, part in rank_slices(config, Grid(1, 1, 0)).items()
    }
    return _found(model_dir, defuse(config, entries), everything, config)


def check_weights(model_dir: str | Path, tp: int = 1, pp: int = 1, rank: int | None = None) -> None:
    """See that every tensor is there, whole and of the right shape, by the files' headers alone.

    With no `rank`, those files of a sharded model are looked at that this host has.

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
    read_header(path)  # which names a file that is cut short
    if weights_digest([path]) != manifest.files.get(path.name):
        raise invalid_model(f"{path} is not the file that the manifest beside it was written with")


def _found(
    model_dir: str | Path, entries: Mapping[str, Entry], parts: Mapping[str, Slice], config: ModelConfig
) -> Found:
    tensors = {}
    for name, part in parts.items():
        entry = entries.get(name)
        if entry is None:
            raise invalid_model(f"{model_dir} has no tensor {name}")
        if entry.shape != part.shape:
            raise invalid_model(
                f"{name} in {entry.path} has the shape {list(entry.shape)}, expected {list(part.shape)}"
            )
        if entry.dtype not in _DTYPES:
            raise invalid_model(f"{name} in {entry.path} has the dtype {entry.dtype}, which is not supported")
        tensors[name] = Located(entry, part)
    return Found(
        tensors, tuple(sorted(name for name in entries.keys() - parts.keys() if _is_odd(name, config)))
    )


def _is_odd(name: str, config: ModelConfig) -> bool:
    """Whether a name deserves a word: not what old checkpoints hold that follows from the rest."""
    return not (name.endswith("rotary_emb.inv_freq") or (name == HEAD and config.tied_embeddings))
