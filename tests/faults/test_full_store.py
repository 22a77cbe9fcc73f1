"""etcd has no space left and refuses every write: streams continue, and a dead engine is formed again."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from aetcd import rpc

from phalanx.cli.local.embedded_etcd import command, free_port, wait_until_healthy
from tests.cluster import Cluster
from tests.faults.streams import MODES, VICTIMS, counter, replicas_reached, shards, stream_all
from tests.until import until_sync

QUOTA = 16 << 20
FILLER = b"filler/"
END = b"filler0"  # the first key after all that begin with FILLER ("0" follows "/")


@contextlib.contextmanager
def small_etcd(folder: Path) -> Iterator[str]:
    """Start an etcd with a quota of QUOTA bytes; yields its endpoint."""
    endpoint, peer = f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    line = [*command(folder, f"http://{endpoint}", peer), f"--quota-backend-bytes={QUOTA}"]
    with subprocess.Popen(line) as process:
        try:
            asyncio.run(wait_until_healthy(endpoint, 30.0))
            yield endpoint
        finally:
            process.terminate()


def fill(endpoint: str) -> None:
    """Write until etcd refuses."""
    with grpc.insecure_channel(endpoint) as channel:
        store = rpc.KVStub(channel)
        # More than fits: on a fast disk etcd accepts megabytes before it measures its size again.
        keys = (FILLER + b"%d" % number for number in range(32 * QUOTA >> 20))
        puts = (rpc.PutRequest(key=key, value=bytes(1 << 20)) for key in keys)
        with pytest.raises(grpc.RpcError) as refused:
            collections.deque((store.Put(put, timeout=10.0) for put in puts), maxlen=0)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def make_room(endpoint: str) -> None:
    """Do what an operator does: delete, compact, defragment, disarm."""
    with grpc.insecure_channel(endpoint) as channel:
        store, upkeep = rpc.KVStub(channel), rpc.MaintenanceStub(channel)
        gone = store.DeleteRange(rpc.DeleteRangeRequest(key=FILLER, range_end=END), timeout=10.0)
        store.Compact(
            rpc.CompactionRequest(revision=gone.header.revision, physical=True),
            timeout=10.0,
        )
        upkeep.Defragment(rpc.DefragmentRequest(), timeout=20.0)
        for alarm in upkeep.Alarm(rpc.AlarmRequest(action=rpc.AlarmRequest.GET), timeout=10.0).alarms:
            off = rpc.AlarmRequest.DEACTIVATE
            disarm = rpc.AlarmRequest(action=off, memberID=alarm.memberID, alarm=alarm.alarm)
            upkeep.Alarm(disarm, timeout=10.0)


@pytest.mark.timeout(240)
@pytest.mark.long
def test_a_store_without_space_stops_no_stream_and_keeps_no_engine_down(
    demo_model: Path, tmp_path: Path
) -> None:
    with (
        small_etcd(tmp_path / "etcd") as etcd,
        Cluster.start(
            demo_model, tmp_path / "state", replicas=2, tp=2, arguments=("--etcd", etcd)
        ) as cluster,
    ):
        undisturbed = asyncio.run(stream_all(cluster, MODES["sampled"]))
        engine = VICTIMS["the leader's engine"](shards(cluster, f"{cluster.model}-0"))
        fill(etcd)
        disturbed = asyncio.run(stream_all(cluster, MODES["sampled"], lambda: cluster.kill(engine)))
        assert disturbed == undisturbed
        assert counter(cluster, "phalanx_failovers_total") > 0, "nothing ran where it was killed"
        until_sync(lambda: replicas_reached(cluster) == 2, deadline_s=60)
        assert asyncio.run(stream_all(cluster, MODES["sampled"])) == undisturbed
        make_room(etcd)

        def all_is_well() -> bool:
            ready = [worker for worker in cluster.workers() if worker["state"] == "ready"]
            return len(ready) == 4 and replicas_reached(cluster) == 2

        until_sync(all_is_well, deadline_s=60)
        assert asyncio.run(stream_all(cluster, MODES["sampled"])) == undisturbed
        assert counter(cluster, "phalanx_failed_total") == 0
