"""SIGSTOP of an engine: it lives, but computes nothing. No stream notices; the replica is formed again."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.cluster import Cluster
from tests.faults.streams import MODES, VICTIMS, Stream, counter, has_come_back, shards, stream_all
from tests.until import until_sync

ENGINES = ["the leader's engine", "a follower's engine"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", ENGINES)
def test_no_stream_notices_a_hang(
    cluster: Cluster, undisturbed: dict[str, list[Stream]], victim: str
) -> None:
    replica = f"{cluster.model}-0"
    before = shards(cluster, replica)
    failovers = counter(cluster, "phalanx_failovers_total")
    stop = VICTIMS[victim](before)

    disturbed = asyncio.run(stream_all(cluster, MODES["sampled"], lambda: os.kill(stop, signal.SIGSTOP)))

    assert disturbed == undisturbed["sampled"]
    assert counter(cluster, "phalanx_failovers_total") > failovers, "nothing was running where it hung"
    assert counter(cluster, "phalanx_failed_total") == 0
    epoch = max(worker["epoch"] for worker in before)
    until_sync(lambda: has_come_back(cluster, replica, epoch), deadline_s=60)
    assert asyncio.run(stream_all(cluster, MODES["sampled"])) == undisturbed["sampled"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("victim", ENGINES)
def test_a_replica_that_hangs_while_idle_is_formed_anew(cluster: Cluster, victim: str) -> None:
    replica = f"{cluster.model}-0"
    before = shards(cluster, replica)
    os.kill(VICTIMS[victim](before), signal.SIGSTOP)
    epoch = max(worker["epoch"] for worker in before)
    until_sync(lambda: has_come_back(cluster, replica, epoch), deadline_s=60)


@pytest.mark.timeout(180)
def test_no_stream_notices_that_a_worker_stands_still_and_wakes(
    cluster: Cluster, undisturbed: dict[str, list[Stream]]
) -> None:
    replica = f"{cluster.model}-0"
    before = shards(cluster, replica)
    failovers = counter(cluster, "phalanx_failovers_total")
    leader = VICTIMS["the leader's worker"](before)
    try:
        disturbed = asyncio.run(
            stream_all(cluster, MODES["sampled"], lambda: os.kill(leader, signal.SIGSTOP))
        )
        until_sync(lambda: leader not in {worker["server_pid"] for worker in cluster.workers()})
    finally:
        os.kill(leader, signal.SIGCONT)
    assert disturbed == undisturbed["sampled"]
    assert counter(cluster, "phalanx_failovers_total") > failovers, "nothing was running where it stood still"
    assert counter(cluster, "phalanx_failed_total") == 0
    epoch = max(worker["epoch"] for worker in before)
    until_sync(lambda: has_come_back(cluster, replica, epoch), deadline_s=60)
    assert asyncio.run(stream_all(cluster, MODES["sampled"])) == undisturbed["sampled"]
