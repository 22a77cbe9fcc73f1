from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import hypothesis
import pytest

from tests import device  # noqa: F401  # before anything imports Triton
from tests.cluster import PHALANX

ROOT = Path(__file__).parents[1]
SECONDS = 20

# No test fails for its time: machines stall.
hypothesis.settings.register_profile("phalanx", deadline=None)
hypothesis.settings.load_profile("phalanx")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """A briefly trained demo model, kept until its recipe changes."""
    recipe = [ROOT / "phalanx/cli/demo_model.py", ROOT / "phalanx/cli/training.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in recipe)).hexdigest()[:12]
    cache = ROOT / ".phalanx/test-model"
    model = cache / digest
    if not model.exists():
        shutil.rmtree(cache, ignore_errors=True)
        subprocess.run([*PHALANX, "demo-model", str(model), "--seconds", str(SECONDS)], check=True)
    return model
