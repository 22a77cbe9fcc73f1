"""SIGKILL and SIGTERM of a gateway under load: its clients resume at the other one, and no token is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import urllib.request

import pytest

from tests.cluster import Cluster
from tests.faults.streams import MODES, Stream, has_come_back, shards, stream_all
from tests.until import until_sync

LONG = 950  # tokens; they take seconds, so every request has a checkpoint long before it ends


def serves(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health") as response:
            return response.status == 200
    except OSError:
        return False


def other_resumed(cluster: Cluster) -> float:
    """How many requests clients have resumed at the second gateway."""
    with urllib.request.urlopen(f"{cluster.info()['gateways'][1]['http']}/metrics") as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("phalanx_resumed_total "))


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("signum", "mode"), [(signal.SIGKILL, "sampled"), (signal.SIGTERM, "greedy")])
def test_no_stream_is_lost_with_its_gateway(
    cluster: Cluster, undisturbed: dict[str, list[Stream]], signum: signal.Signals, mode: str
) -> None:
    gateway, resumed = cluster.process("gateway-0"), other_resumed(cluster)
    disturbed = asyncio.run(stream_all(cluster, MODES[mode], lambda: os.kill(gateway, signum)))
    assert disturbed == undisturbed[mode]
    if signum is signal.SIGKILL:
        assert other_resumed(cluster) == resumed + len(disturbed), "nothing ran where it was killed"
    until_sync(lambda: serves(cluster.http), deadline_s=60)


@pytest.mark.timeout(180)
def test_no_stream_is_lost_with_its_gateway_and_its_leader(cluster: Cluster) -> None:
    options = MODES["sampled"] | {"max_tokens": LONG}
    whole = asyncio.run(stream_all(cluster, options))
    replica = f"{cluster.model}-0"
    before = shards(cluster, replica)
    gateway, leader, resumed = cluster.process("gateway-0"), before[0]["server_pid"], other_resumed(cluster)

    def kill_both() -> None:
        cluster.kill(gateway)
        cluster.kill(leader)

    assert asyncio.run(stream_all(cluster, options, kill_both, hurt_at=LONG // 2)) == whole
    assert other_resumed(cluster) == resumed + len(whole)
    until_sync(lambda: serves(cluster.http), deadline_s=60)
    epoch = max(worker["epoch"] for worker in before)
    until_sync(lambda: has_come_back(cluster, replica, epoch), deadline_s=60)
