"""Writes a model as one weights file per rank of a layout, so that each host needs only its ranks' files.

Copies bytes as they are, some rows at a time: memory never holds a whole tensor. Imports no torch.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy

from engine.config import TOKENIZER_FILES
from engine.grid import Grid
from engine.weights.checkpoint import (
    CONFIG_FILES,
    invalid_model,
    weight_files,
    weights_digest,
)
from engine.weights.locate import find_tensors
from engine.weights.manifest import Manifest, read_manifest, shard_name, write_manifest
from engine.weights.model_config import ModelConfig, check_layout
from engine.weights.safetensors_header import StoredTensor, write_header
from engine.weights.tensors import TensorSlice, rank_slices

_BYTES_PER_READ = 16 << 20


def shard_model(
    source: Path,
    destination: Path,
    tp: int,
    pp: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write `pp{i}_tp{j}.safetensors` for every rank, copy configuration and tokeniser, and write a manifest.

    The manifest comes last: a directory without it is not taken for a model.

    Args:
        source: an ordinary model directory.
        destination: a directory that does not exist or is empty.
        tp: tensor parallel ranks per stage.
        pp: pipeline stages.
        progress: called with the bytes written, and the bytes to write in all.

    Returns:
        The weights files, in rank order.

    Raises:
        ModelError: the source or the layout cannot be served, or the destination is in use.
    """
    config = ModelConfig.load(source)
    check_layout(config, tp, pp)
    if read_manifest(source) is not None:
        raise invalid_model(f"{source} is sharded already; shard the model that it was made from")
    tensors = find_tensors(source, config, Grid(1, 1, 0)).stored
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise invalid_model(f"{destination} is not an empty directory")
    destination.mkdir(parents=True, exist_ok=True)
    for name in (*CONFIG_FILES, *TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copy2(source / name, destination / name)
    grids = [Grid(tp, pp, rank) for rank in range(tp * pp)]
    slices = {grid: list(rank_slices(config, grid).values()) for grid in grids}
    total = sum(_size(part, tensors[part.name]) for parts in slices.values() for part in parts)
    done = 0
    paths = []
    for grid, parts in slices.items():
        path = destination / shard_name(grid)
        write_header(path, ((part.name, tensors[part.name].dtype, part.shape) for part in parts))
        with path.open("ab") as file:
            for part in parts:
                for data in _read(part, tensors[part.name]):
                    file.write(data)
                    done += len(data)
                    progress(done, total)
        paths.append(path)
    files = {path.name: weights_digest([path]) for path in paths}
    write_manifest(destination, Manifest(tp, pp, weights_digest(weight_files(source)), files))
    return paths


def _size(part: TensorSlice, tensor: StoredTensor) -> int:
    return tensor.item_bytes * math.prod(part.shape)


def _read(part: TensorSlice, tensor: StoredTensor) -> Iterator[bytes]:
    """The bytes of a slice, some rows at a time."""
    step = max(1, _BYTES_PER_READ // max(1, tensor.row_bytes))
    with tensor.path.open("rb") as file:
        for first in range(part.rows.start, part.rows.stop, step):
            count = min(step, part.rows.stop - first)
            offset = tensor.offset + first * tensor.row_bytes
            data = _read_exactly(file, offset, count * tensor.row_bytes, part.name)
            if part.columns is None:
                yield data
            else:
                rows = numpy.frombuffer(data, numpy.uint8).reshape(count, tensor.row_bytes)
                start, stop = (
                    column * tensor.item_bytes for column in (part.columns.start, part.columns.stop)
                )
                yield rows[:, start:stop].tobytes()


def _read_exactly(file: BinaryIO, offset: int, size: int, name: str) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise invalid_model(f"{file.name} is cut short: {name} ends before its last row")
    return data
