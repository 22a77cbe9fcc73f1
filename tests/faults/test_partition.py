"""A host is cut off in silence: streams continue elsewhere, its frames are ignored, and it comes back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults.hosts import missing, two_hosts, wire
from tests.faults.streams import MODES, counter, stream_all
from tests.faults.workers import deploy, runs
from tests.until import until_sync


@pytest.mark.timeout(240)
@pytest.mark.skipif(bool(missing()), reason=missing())
@pytest.mark.long
def test_a_host_that_is_cut_off_takes_no_stream_along(demo_model: Path, tmp_path: Path) -> None:
    with wire() as line, two_hosts(demo_model, tmp_path, line, near_workers=3) as cluster:
        deploy(cluster, replicas=2, tp=2)
        until_sync(lambda: runs(cluster, 2, 1, "ready", replicas=2), deadline_s=90)
        leaders = {one["worker"] for one in cluster.workers() if one["tp_rank"] == 0}
        assert "far" in leaders, "the leader of one replica is to be cut off from its follower"
        undisturbed = asyncio.run(stream_all(cluster, MODES["sampled"]))
        assert asyncio.run(stream_all(cluster, MODES["sampled"], line.cut)) == undisturbed
        assert counter(cluster, "phalanx_failovers_total") > 0, "nothing ran where it was cut off"
        assert asyncio.run(stream_all(cluster, MODES["sampled"])) == undisturbed
        line.mend()
        until_sync(lambda: runs(cluster, 2, 1, "ready", replicas=2), deadline_s=120)
        assert asyncio.run(stream_all(cluster, MODES["sampled"])) == undisturbed
        assert counter(cluster, "phalanx_failed_total") == 0
        assert counter(cluster, "phalanx_lost_total") == 0
