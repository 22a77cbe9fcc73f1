"""Which tiles compute a product fastest on this GPU: measured once per shape, then cached on disk.

Shapes with the same M, rounded up to a power of two, share a choice: so a step's bits do not depend on
which of these shapes was measured first.
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
        """The key of this shape in the cache file."""
        return f"{self.m}x{self.n}x{self.k} {self.dtype}"


Measure = Callable[[Tiles | None], float]
"""Seconds that a product takes with some tiles or, for None, by cuBLAS."""


class Tuner:
    """Owns: the choices, and their cache file. Does not own: the measurement.

    Args:
        device: the GPU and the versions of torch and Triton. A file of another GPU or version is not used.
        path: the cache file; None for no file.
    """

    def __init__(self, device: str, path: Path | None) -> None:
        self._device, self._path = device, path
        self._chosen = _read(path, device)

    def choose(self, shape: Shape, measure: Measure) -> Tiles | None:
        """The fastest tiles of a shape; None for cuBLAS, which also wins unless some tiles are 3 % faster."""
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
        """Replace the file atomically: several ranks may write it at the same time."""
        if self._path is None:
            return
        chosen = {key: None if tiles is None else asdict(tiles) for key, tiles in self._chosen.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump({"device": self._device, "chosen": chosen}, file, indent=1)
            os.replace(file.name, self._path)
        except OSError as error:
            _log.warning("measured tiles are not saved: %s", error)


def cache_path(device: str) -> Path:
    """The cache file of a device, under XDG_CACHE_HOME, by default ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "".join(letter if letter.isalnum() else "-" for letter in device.lower())
    return root / "phalanx" / f"products-{name}.json"


def _read(path: Path | None, device: str) -> dict[str, Tiles | None]:
    """The choices in the file; none if it is missing, damaged or of another device."""
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        chosen: Mapping[str, dict[str, int] | None] = content["chosen"] if content["device"] == device else {}
        return {key: None if tiles is None else Tiles(**tiles) for key, tiles in chosen.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is not used: %r", path, error)
        return {}
