from __future__ import annotations

import subprocess
from pathlib import Path

from tests.cluster import PHALANX


def test_the_demo_shows_a_stream_that_outlives_its_engine(demo_model: Path) -> None:
    done = subprocess.run([*PHALANX, "demo", "--model", str(demo_model)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[SIGKILL: engine " in done.stdout
    assert "tokens equal        200 of 200" in done.stdout
