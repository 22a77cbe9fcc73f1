"""A replica that loses a worker for good, with none to spare, goes on in a smaller layout, and grows back."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.faults.streams import MODES, counter, replicas_reached, stream_all
from tests.until import until_sync


@contextlib.contextmanager
def worker(cluster: Cluster, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that nobody starts again."""
    etcd = ",".join(cluster.info()["etcd"])
    command = [sys.executable, "-m", "dataplane.shard.main", "--etcd", etcd, "--name", name, "--host", "here"]
    with (cluster.state_dir / "logs" / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def deploy(cluster: Cluster, tp: int, pp: int) -> None:
    """Apply another layout."""
    document = cluster.state_dir / "deployment.yaml"
    document.write_text(f"{{name: {cluster.model}, model: {cluster.model_dir}, tp: {tp}, pp: {pp}}}")
    applied = cluster.phalanx("apply", "-f", str(document))
    assert applied.returncode == 0, applied.stderr


def runs(cluster: Cluster, tp: int, pp: int, state: str) -> bool:
    """Whether the deployment is in this state, its replica ready in this layout, and reached."""
    (deployment,), (replica,) = cluster.get("deployments"), cluster.get("replicas")
    found = (deployment["state"], replica["state"], replica["tp"], replica["pp"])
    return found == (state, "ready", tp, pp) and replicas_reached(cluster) == 1


@pytest.mark.timeout(240)
def test_a_replica_shrinks_when_a_worker_is_gone_for_good_and_grows_when_one_joins(
    demo_model: Path, tmp_path: Path
) -> None:
    with Cluster.start(demo_model, tmp_path, tp=2, arguments=("--workers", "3")) as cluster:
        with worker(cluster, "lost") as lost:
            deploy(cluster, 2, 2)
            until_sync(lambda: runs(cluster, 2, 2, "ready"), deadline_s=60)
            undisturbed = asyncio.run(stream_all(cluster, MODES["sampled"]))
            assert asyncio.run(stream_all(cluster, MODES["sampled"], lost.kill)) == undisturbed
            until_sync(lambda: runs(cluster, 2, 1, "degraded"), deadline_s=60)
            assert asyncio.run(stream_all(cluster, MODES["sampled"])) == undisturbed
        with worker(cluster, "joined"):
            until_sync(lambda: runs(cluster, 2, 2, "ready"), deadline_s=90)
            assert asyncio.run(stream_all(cluster, MODES["sampled"])) == undisturbed
        assert counter(cluster, "phalanx_failed_total") == 0
        assert counter(cluster, "phalanx_lost_total") == 0
