"""Looks through a whole model directory, ordinary or sharded, for what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.grid import Grid
from engine.weights.locate import find_tensors
from engine.weights.manifest import read_manifest
from engine.weights.model_config import ModelConfig
from engine.weights.source import FileSource, check_finite, pieces


def check_model(
    model_dir: Path,
    *,
    values: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[str, ...]:
    """See that every tensor is there, whole and of the right shape.

    Args:
        model_dir: the directory.
        values: also read every value, and refuse what is NaN or infinite.
        progress: told the tensors read and to be read in all.

    Returns:
        Names of tensors that are no part of the model.

    Raises:
        ModelError: INVALID_MODEL, naming the file, the tensor and the place in it.
    """
    config, manifest = ModelConfig.load(model_dir), read_manifest(model_dir)
    tp, pp = (1, 1) if manifest is None else (manifest.tp, manifest.pp)
    ranks = [find_tensors(model_dir, config, Grid(tp, pp, rank)) for rank in range(tp * pp)]
    if values:
        done, total = 0, sum(len(found.tensors) for found in ranks)
        for found in ranks:
            with FileSource(found.tensors) as source:
                for located in sorted(found.tensors.values(), key=lambda each: source.place(each.part.name)):
                    for part in pieces(located.part):
                        check_finite(source.read(part), part, source)
                    done += 1
                    progress(done, total)
    return tuple(sorted({name for found in ranks for name in found.unknown}))
