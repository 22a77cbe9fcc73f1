"""Whether there is a GPU: its tests then use it, and otherwise Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path

GPU = any(Path("/dev").glob("nvidia[0-9]*"))

# Whoever imports Triton first decides.
os.environ.setdefault("TRITON_INTERPRET", "0" if GPU else "1")
