"""Starts the supervisor process and reads its progress."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from phalanx.cli import cluster
from phalanx.cli.failure import Failure
from phalanx.cli.local import lock, processes, retire
from phalanx.cli.local.spec import MARK, LocalSpec, log_path
from phalanx.cli.local.stop import stop


class Starter:
    """A supervisor process on a tether: a pipe that closes when this process ends, which stops the cluster.

    Owns: the supervisor process until `release`. Does not own: the processes that the supervisor starts.
    """

    def __init__(self, spec: LocalSpec) -> None:
        self._state_dir = Path(spec.state_dir)
        lock_fd = _prepare(self._state_dir)
        progress, progress_fd = os.pipe()
        tether_fd, self._tether = os.pipe()
        inherited = (lock_fd, progress_fd, tether_fd)
        try:
            with log_path(spec, "supervisor").open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "phalanx.cli.local", spec.to_json(), *map(str, inherited)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=inherited,
                    start_new_session=True,
                    cwd=self._state_dir,
                    env={**os.environ, MARK: spec.state_dir},
                )
        finally:
            for fd in inherited:
                os.close(fd)
        self._progress = os.fdopen(progress, "rb")

    async def progress(self) -> AsyncIterator[dict[str, Any]]:
        """The supervisor's progress messages until it ends: `served` NAME, `up`, `failed` REASON."""
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self._progress)
        async for line in reader:
            yield json.loads(line)

    def release(self) -> None:
        """Let the cluster run on when this process ends."""
        os.write(self._tether, b"\n")

    def stop(self) -> None:
        """Stop the cluster in order, and wait until its supervisor has ended."""
        stop(self._state_dir)
        self._process.wait()


def _prepare(state_dir: Path) -> int:
    """Prepare the state directory for a new cluster; returns the lock. Raises Failure when it is in use."""
    state_dir.mkdir(parents=True, exist_ok=True)
    lock_fd = lock.take(state_dir)
    if lock_fd is None:
        running = cluster.read(state_dir)
        where = f" at {running.http}" if running else ""
        raise Failure(f"a cluster is running in {state_dir} already{where}; `phalanx down` stops it")
    if processes.pids(state_dir):
        os.close(lock_fd)
        raise Failure(f"a cluster in {state_dir} has lost its supervisor; `phalanx down` stops what is left")
    cluster.remove(state_dir)  # a crash or a reboot leaves it behind
    retire.forget(state_dir)
    for folder in ("etcd", "logs"):
        shutil.rmtree(state_dir / folder, ignore_errors=True)
    (state_dir / "logs").mkdir()
    return lock_fd
