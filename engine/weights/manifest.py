"""The manifest of a sharded model: the directory that `phalanx shard-model` writes.

The directory has one weights file per rank, the manifest that describes them, and copies of the source's
configuration and tokeniser files. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.errors import ModelError
from engine.grid import Grid
from engine.weights.checkpoint import invalid_model, read_json

MANIFEST = "phalanx-shards.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """The layout, the digest of the source model's weights, and the digest of each file by name."""

    tp: int
    pp: int
    source: str
    files: Mapping[str, str]


def shard_name(grid: Grid) -> str:
    """The name of a rank's weights file."""
    return f"pp{grid.pp_rank}_tp{grid.tp_rank}.safetensors"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest atomically."""
    draft = directory / f"{MANIFEST}.tmp"
    draft.write_text(json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=2) + "\n")
    draft.rename(directory / MANIFEST)


def read_manifest(model_dir: str | Path) -> Manifest | None:
    """The manifest of a sharded model; None for an ordinary directory.

    Raises:
        ModelError: INVALID_MODEL, when the manifest has another format.
    """
    path = Path(model_dir) / MANIFEST
    match read_json(path):
        case None:
            return None
        case {"format": 1, "tp": int(tp), "pp": int(pp), "source": str(source), "files": dict(files)}:
            return Manifest(tp, pp, source, files)
    raise invalid_model(f"{path} is not a manifest of format {_FORMAT}")


def check_shards(model_dir: str | Path, manifest: Manifest, tp: int, pp: int) -> None:
    """Check that a sharded model was written for this layout.

    Raises:
        ModelError: INVALID_LAYOUT.
    """
    if (manifest.tp, manifest.pp) != (tp, pp):
        raise ModelError(
            "INVALID_LAYOUT",
            f"{model_dir} was sharded for TP {manifest.tp} and PP {manifest.pp}, not for TP {tp} and PP {pp}",
        )
