"""A replica loses a worker for good, with no spare one: it runs in a smaller layout, and grows back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.faults.streams import MODES, counter, stream_all
from tests.faults.workers import deploy, runs, worker
from tests.until import until_sync


@pytest.mark.timeout(240)
def test_a_replica_shrinks_when_a_worker_is_gone_for_good_and_grows_when_one_joins(
    demo_model: Path, tmp_path: Path
) -> None:
    with Cluster.start(demo_model, tmp_path, tp=2, arguments=("--workers", "3")) as cluster:
        with worker(cluster, "lost") as lost:
            deploy(cluster, tp=2, pp=2)
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
