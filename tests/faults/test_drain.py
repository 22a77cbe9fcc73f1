"""SIGTERM of a worker: its requests end where they are, or are handed over when the time is up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.faults.streams import MODES, counter, stream_all
from tests.faults.workers import deploy, runs, worker
from tests.until import until_sync

LONG = MODES["sampled"] | {"max_tokens": 900}  # seconds: much longer than gateways take to look elsewhere


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("drain_s", "handed_over"), [("60", False), ("0.01", True)])
def test_a_worker_that_is_told_to_leave_drops_nothing(
    demo_model: Path, tmp_path: Path, drain_s: str, handed_over: bool
) -> None:
    with (
        Cluster.start(demo_model, tmp_path, arguments=("--workers", "1")) as cluster,
        worker(cluster, "leaving", "--drain-s", drain_s) as leaving,
    ):
        deploy(cluster, replicas=2)
        until_sync(lambda: runs(cluster, 1, 1, "ready", replicas=2), deadline_s=60)
        undisturbed = asyncio.run(stream_all(cluster, LONG))
        assert asyncio.run(stream_all(cluster, LONG, leaving.terminate)) == undisturbed
        assert leaving.wait(timeout=30) == 0
        assert (counter(cluster, "phalanx_failovers_total") > 0) == handed_over
        assert asyncio.run(stream_all(cluster, LONG)) == undisturbed
        assert counter(cluster, "phalanx_failed_total") == 0
