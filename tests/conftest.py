from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import hypothesis
import pytest

from tests import device  # noqa: F401  # before anything imports Triton
from tests.cluster import PHALANX

ROOT = Path(__file__).parents[1]
TRAINING_S = 20
NICENESS = 10
# Tests of real processes: whole clusters, kills and timeouts. They run one after another, before all others,
# and what runs beside them has a lower priority.
REAL_PROCESSES = ("cli", "e2e", "faults", "interop", "shard", "store")

# No test fails for its time: machines stall.
hypothesis.settings.register_profile("phalanx", deadline=None)
hypothesis.settings.load_profile("phalanx")


def runs_real_processes(item: pytest.Item) -> bool:
    folder, *rest = item.path.relative_to(ROOT / "tests").parts
    return bool(rest) and folder in REAL_PROCESSES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for `--dist loadgroup`: a group stays in one process, which makes each fixture once."""
    items.sort(key=runs_real_processes, reverse=True)
    for item in items:
        name = "real processes" if runs_real_processes(item) else item.location[0]
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and not runs_real_processes(item) and os.nice(0) < NICENESS:
        os.nice(NICENESS)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """A briefly trained demo model, kept until its recipe changes."""
    recipe = [ROOT / f"phalanx/cli/{name}.py" for name in ("demo_model", "demo_llama", "demo_training")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in recipe)).hexdigest()[:12]
    cache = ROOT / ".phalanx/test-model"
    model = cache / digest
    cache.parent.mkdir(exist_ok=True)
    with (cache.parent / "test-model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this run may be training it
        if not model.exists():
            shutil.rmtree(cache, ignore_errors=True)
            subprocess.run([*PHALANX, "demo-model", str(model), "--seconds", str(TRAINING_S)], check=True)
    return model
