"""Neither etcd nor a controller answers: streams continue, and an engine that dies meanwhile comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from tests.cluster import Cluster
from tests.faults.streams import MODES, VICTIMS, Stream, counter, replicas_reached, shards, stream_all
from tests.until import until_sync


@contextlib.contextmanager
def standing_still(*pids: int) -> Iterator[None]:
    """SIGSTOP on entry, SIGCONT on exit."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.timeout(180)
def test_an_engine_comes_back_without_etcd_and_without_a_controller(
    cluster: Cluster, undisturbed: dict[str, list[Stream]]
) -> None:
    replica = f"{cluster.model}-0"
    before, failovers = shards(cluster, replica), counter(cluster, "phalanx_failovers_total")
    engine = VICTIMS["the leader's engine"](before)
    with standing_still(cluster.process("etcd-0"), cluster.process("controller-0")):
        disturbed = asyncio.run(stream_all(cluster, MODES["sampled"], lambda: cluster.kill(engine)))
        assert disturbed == undisturbed["sampled"]
        assert counter(cluster, "phalanx_failovers_total") > failovers, "nothing ran where it was killed"
        until_sync(lambda: replicas_reached(cluster) == 2, deadline_s=60)
        assert asyncio.run(stream_all(cluster, MODES["sampled"])) == undisturbed["sampled"]
    assert counter(cluster, "phalanx_failed_total") == 0

    def all_is_well() -> bool:
        mine = [worker for worker in cluster.workers() if worker["state"] == "ready"]
        return len(mine) == 4 and replicas_reached(cluster) == 2

    until_sync(all_is_well, deadline_s=60)
    assert asyncio.run(stream_all(cluster, MODES["sampled"])) == undisturbed["sampled"]
