"""Checks a whole model directory, ordinary or sharded: what `phalanx check-model` runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.grid import Grid
from engine.weights.file_source import FileSource
from engine.weights.locate import find_tensors
from engine.weights.manifest import read_manifest
from engine.weights.model_config import ModelConfig
from engine.weights.source import check_finite, chunks
from engine.weights.tensors import rank_slices


def check_model(
    model_dir: Path,
    *,
    values: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, ...]:
    """Check that every tensor is present, complete and of the right shape.

    Args:
        model_dir: the directory.
        values: also read every value, and refuse NaN and infinity.
        progress: called with the number of tensors read, and the number of tensors.

    Returns:
        Names of tensors that are no part of the model.

    Raises:
        ModelError: INVALID_MODEL, naming the file, the tensor and the place in it.
    """
    config, manifest = ModelConfig.load(model_dir), read_manifest(model_dir)
    tp, pp = (1, 1) if manifest is None else (manifest.tp, manifest.pp)
    grids = [Grid(tp, pp, rank) for rank in range(tp * pp)]
    ranks = [find_tensors(model_dir, config, grid) for grid in grids]
    if values:
        done, total = 0, sum(len(tensors.stored) for tensors in ranks)
        for grid, tensors in zip(grids, ranks, strict=True):
            with FileSource(tensors.stored) as source:
                slices = rank_slices(config, grid).values()
                for part in sorted(slices, key=lambda part: source.order(part.name)):
                    for chunk in chunks(part):
                        check_finite(source.read(chunk), chunk, source)
                    done += 1
                    progress(done, total)
    return tuple(sorted({name for tensors in ranks for name in tensors.unknown_names}))
