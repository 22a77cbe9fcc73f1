"""A whole cluster of real processes for tests, started and stopped as a user does it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

PHALANX = [sys.executable, "-m", "phalanx.cli"]
UP_WITHIN_S = 100.0


@dataclass
class Cluster:
    """A cluster started by `phalanx up --detach`. `model` is the deployment's name."""

    state_dir: Path
    model_dir: Path
    model: str = "demo"

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        model_dir: Path,
        state_dir: Path,
        *,
        replicas: int = 1,
        tp: int = 1,
        pp: int = 1,
        environment: Mapping[str, str] | None = None,
        arguments: tuple[str, ...] = (),
    ) -> Iterator[Self]:
        """Up on entry with every replica ready, down on exit with nothing left."""
        cluster = cls(state_dir, model_dir)
        shape = ["--replicas", str(replicas), "--tp", str(tp), "--pp", str(pp)]
        up = ["up", "--detach", "--model", str(model_dir), "--name", cluster.model, *shape]
        up += ["--http-port", "0", "--grpc-port", "0", "--timeout", str(UP_WITHIN_S), *arguments]
        try:
            started = cluster.phalanx(*up, environment=environment)
            assert started.returncode == 0, f"{started.stderr}\n{cluster.logs()}"
            yield cluster
        finally:
            stopped = cluster.phalanx("down")
            assert stopped.returncode == 0, stopped.stderr

    @property
    def http(self) -> str:
        """The gateway's URL."""
        return str(self.info()["http"])

    @property
    def grpc(self) -> str:
        """host:port of the gateway."""
        return str(self.info()["grpc"])

    def info(self) -> dict[str, Any]:
        """cluster.json as it is now."""
        info: dict[str, Any] = json.loads((self.state_dir / "cluster.json").read_text())
        return info

    def process(self, name: str) -> int:
        """The pid of a program, by its name in cluster.json."""
        return next(int(item["pid"]) for item in self.info()["processes"] if item["name"] == name)

    def workers(self) -> list[dict[str, Any]]:
        """What `phalanx get workers -o json` says."""
        return self.get("workers")

    def get(self, kind: str) -> list[dict[str, Any]]:
        """What `phalanx get KIND -o json` says."""
        shown = self.phalanx("get", kind, "-o", "json")
        assert shown.returncode == 0, shown.stderr
        rows: list[dict[str, Any]] = json.loads(shown.stdout)
        return rows

    def kill(self, pid: int) -> None:
        """SIGKILL a process of the cluster."""
        os.kill(pid, signal.SIGKILL)

    def phalanx(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the `phalanx` command on this cluster's state directory."""
        return subprocess.run(
            [*PHALANX, *arguments, "--state-dir", str(self.state_dir)],
            capture_output=True,
            text=True,
            timeout=UP_WITHIN_S + 60,
            env={**os.environ, **(environment or {})},
        )

    def logs(self, most: int = 2000) -> str:
        """The end of every log, for a test that failed; so many characters of each."""
        paths = sorted((self.state_dir / "logs").glob("*.log"))
        return "\n".join(f"{path.name}: ...{path.read_text()[-most:]}" for path in paths)
