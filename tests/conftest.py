from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

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


def runs_real_processes(nodeid: str) -> bool:
    folder, *rest = nodeid.removeprefix("tests/").split("/")
    return bool(rest) and folder in REAL_PROCESSES


class Scheduler(LoadScopeScheduling):
    """Gives each process of a parallel run one file at a time, so that a module's fixtures are made once."""

    def _split_scope(self, nodeid: str) -> str:
        return "real processes" if runs_real_processes(nodeid) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)  # pytest -p no:xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    config.option.loadscopereorder = False  # keep the order of `pytest_collection_modifyitems`
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: runs_real_processes(item.nodeid), reverse=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and not runs_real_processes(item.nodeid) and os.nice(0) < NICENESS:
        os.nice(NICENESS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    trained_demo_model()  # before others compete for the cores: it is trained for a time, not for some steps


def trained_demo_model() -> Path:
    """A briefly trained demo model, kept until its recipe changes."""
    recipe = [ROOT / f"phalanx/cli/{name}.py" for name in ("demo_model", "demo_llama", "demo_training")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in recipe)).hexdigest()[:12]
    cache = ROOT / ".phalanx/test-model"
    model = cache / digest
    if not model.exists():
        shutil.rmtree(cache, ignore_errors=True)
        subprocess.run([*PHALANX, "demo-model", str(model), "--seconds", str(TRAINING_S)], check=True)
    return model


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return trained_demo_model()
