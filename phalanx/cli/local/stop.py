"""Stops a local cluster, whatever state it is in."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from phalanx.cli import cluster
from phalanx.cli.local import lock, processes

SUPERVISOR_WITHIN_S = 45.0  # the supervisor stops four stages, each within ten seconds
STRAYS_WITHIN_S = 5.0


def stop(state_dir: Path) -> int:
    """End every process of a cluster; returns how many there were.

    The supervisor, if it is alive, stops the others in order. `state_dir` must be absolute, because the
    processes are marked with the absolute path.
    """
    running = len(processes.pids(state_dir))
    signed = lock.holder(state_dir)
    if running and signed is not None:
        with processes.member(state_dir, signed) as supervisor:
            if supervisor is not None:
                supervisor.send(signal.SIGTERM)
                supervisor.wait(SUPERVISOR_WITHIN_S)
    processes.end_all(state_dir, STRAYS_WITHIN_S)
    cluster.remove(state_dir)
    shutil.rmtree(state_dir / "etcd", ignore_errors=True)
    return running
