"""The processes of a local cluster are found and ended, others are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.cli.local import processes
from phalanx.cli.local.spec import MARK
from phalanx.cli.local.stop import stop


def sleeper(state_dir: Path, program: str = "import time; time.sleep(600)") -> subprocess.Popen[bytes]:
    environ = {**os.environ, MARK: str(state_dir)}
    return subprocess.Popen([sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE)


def test_a_stranger_is_no_member(tmp_path: Path):
    """A pid from an old cluster.json may belong to another process now."""
    other = sleeper(tmp_path / "other")
    try:
        with processes.member(tmp_path, other.pid) as found:
            assert found is None
        assert processes.pids(tmp_path) == []
        assert stop(tmp_path) == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()
    with processes.member(tmp_path, other.pid) as found:
        assert found is None


def test_stop_ends_what_ignores_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("phalanx.cli.local.stop.STRAYS_WITHIN_S", 0.0)
    ignoring = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    stubborn = sleeper(tmp_path, ignoring)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    assert stop(tmp_path) == 1
    stubborn.communicate()
    assert stubborn.returncode == -signal.SIGKILL
