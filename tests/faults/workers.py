"""Workers that a test starts itself, so that no supervisor restarts them, and conditions to wait for."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from tests.cluster import Cluster
from tests.faults.streams import replicas_reached


@contextlib.contextmanager
def worker(cluster: Cluster, name: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a worker of this cluster; kills it at the end if it still runs."""
    etcd = ",".join(cluster.info()["etcd"])
    command = [sys.executable, "-m", "dataplane.shard.main", "--etcd", etcd, "--name", name, "--host", "here"]
    with (cluster.state_dir / "logs" / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def deploy(cluster: Cluster, **shape: int) -> None:
    """Change the shape of the deployment."""
    fields = {"name": cluster.model, "model": str(cluster.model_dir), **shape}
    document = cluster.state_dir / "deployment.yaml"
    document.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    applied = cluster.phalanx("apply", "-f", str(document))
    assert applied.returncode == 0, applied.stderr


def runs(cluster: Cluster, tp: int, pp: int, state: str, replicas: int = 1) -> bool:
    """Whether the deployment is in this state, and the gateway reaches all replicas, ready in this layout."""
    (deployment,) = cluster.get("deployments")
    found = [(one["state"], one["tp"], one["pp"]) for one in cluster.get("replicas")]
    whole = deployment["state"] == state and found == [("ready", tp, pp)] * replicas
    return whole and replicas_reached(cluster) == replicas
