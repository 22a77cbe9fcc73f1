"""Which way of computing a product is fastest on this GPU: measured once per shape, then remembered on disk.

The choice is by shape alone: M is rounded up to a power of two, so that a step's bits do not hang on which
of its neighbours was measured first.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.kernels.gpu.gemv import CANDIDATES, Tiles

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shape:
    """A product of M rows with a matrix of N rows and K columns."""

    m: int
    n: int
    k: int
    dtype: str

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.m}x{self.n}x{self.k} {self.dtype}"


Measure = Callable[[Tiles | None], float]
"""Seconds that a product takes, cut into tiles or, for None, by cuBLAS."""


class Tuner:
    """Owns: what was measured, and its file. Does not own: the measuring.

    Args:
        device: name of the GPU, and of what else decides, such as versions: a file of another is not used.
        path: the file; None keeps nothing.
    """

    def __init__(self, device: str, path: Path | None) -> None:
        self._device, self._path = device, path
        self._chosen = _read(path, device)

    def choose(self, shape: Shape, measure: Measure) -> Tiles | None:
        """The fastest tiles of a shape; None for cuBLAS, which also wins where nothing beats it clearly."""
        if shape.key not in self._chosen:
            seconds: dict[Tiles | None, float] = {None: measure(None)}
            for tiles in CANDIDATES:
                if tiles.columns * tiles.splits <= max(shape.k, tiles.columns):
                    seconds[tiles] = measure(tiles)
            best = min(seconds, key=lambda tiles: seconds[tiles])
            self._chosen[shape.key] = best if seconds[best] < 0.97 * seconds[None] else None
            self._write()
        return self._chosen[shape.key]

    def _write(self) -> None:
        """Replace the file in one step: several ranks may write it."""
        if self._path is None:
            return
        chosen = {key: None if tiles is None else asdict(tiles) for key, tiles in self._chosen.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump({"device": self._device, "chosen": chosen}, file, indent=1)
            os.replace(file.name, self._path)
        except OSError as error:
            _log.warning("what was measured is not kept: %s", error)


def cache_path(device: str) -> Path:
    """Where a device's choices are kept: under XDG_CACHE_HOME, by default ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "".join(letter if letter.isalnum() else "-" for letter in device.lower())
    return root / "phalanx" / f"products-{name}.json"


def _read(path: Path | None, device: str) -> dict[str, Tiles | None]:
    """Choices of before; none where the file is of another device, damaged or not there."""
    if path is None or not path.is_file():
        return {}
    try:
        kept = json.loads(path.read_text())
        chosen: Mapping[str, dict[str, int] | None] = kept["chosen"] if kept["device"] == device else {}
        return {key: None if tiles is None else Tiles(**tiles) for key, tiles in chosen.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is not used: %r", path, error)
        return {}
