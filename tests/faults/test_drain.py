"""SIGTERM of a worker: its requests finish there, or are replayed elsewhere when the time is up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.faults.streams import MODES, counter, stream_all
from tests.faults.workers import deploy, runs, worker
from tests.until import until_sync

LONG = MODES["sampled"] | {"max_tokens": 600}  # long enough that gateways see the drain before the end


@pytest.mark.timeout(240)
def test_a_worker_that_is_told_to_leave_drops_nothing(demo_model: Path, tmp_path: Path) -> None:
    with Cluster.start(demo_model, tmp_path, arguments=("--workers", "1")) as cluster:
        deploy(cluster, replicas=2)
        with worker(cluster, "patient", "--drain-s", "60") as leaving:
            until_sync(lambda: runs(cluster, 1, 1, "ready", replicas=2), deadline_s=60)
            undisturbed = asyncio.run(stream_all(cluster, LONG))
            assert asyncio.run(stream_all(cluster, LONG, leaving.terminate)) == undisturbed
            assert leaving.wait(timeout=30) == 0
            assert counter(cluster, "phalanx_failovers_total") == 0
        with worker(cluster, "hurried", "--drain-s", "0.01") as leaving:
            until_sync(lambda: runs(cluster, 1, 1, "ready", replicas=2), deadline_s=60)
            assert asyncio.run(stream_all(cluster, LONG, leaving.terminate)) == undisturbed
            assert leaving.wait(timeout=30) == 0
            assert counter(cluster, "phalanx_failovers_total") > 0
        assert counter(cluster, "phalanx_failed_total") == 0
