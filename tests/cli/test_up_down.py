"""`phalanx up` and `down` with real processes: a killed program restarts, and no process is left behind."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phalanx.cli.local import embedded_etcd as embedded
from phalanx.cli.local import processes
from phalanx.store.etcd import EtcdStore
from phalanx.store.interface import Operation, Put
from phalanx.store.keys import Keys
from phalanx.store.records import DeploymentRecord, encode
from tests.cluster import PHALANX, Cluster
from tests.until import until_sync


@pytest.fixture(scope="module")
def cluster(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The tests of this module run in order; the last one that uses the cluster ends it."""
    with Cluster.start(demo_model, tmp_path_factory.mktemp("up")) as cluster:
        yield cluster


def complete(cluster: Cluster) -> list[int]:
    body = {
        "model": cluster.model,
        "prompt": "def ",
        "max_tokens": 8,
        "temperature": 0,
        "return_token_ids": True,
    }
    request = urllib.request.Request(f"{cluster.http}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        ids: list[int] = json.load(response)["choices"][0]["token_ids"]
    return ids


def serves(cluster: Cluster) -> bool:
    try:
        return bool(complete(cluster))
    except OSError:
        return False


def gone(pid: int) -> bool:
    """Whether a process has ended; its new parent may not have reaped it yet."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def addresses(cluster: Cluster) -> dict[str, Any]:
    return {key: value for key, value in cluster.info().items() if key != "processes"}


@pytest.mark.parametrize("name", ["gateway-0", "controller-0", "worker-0", "etcd-0"])
def test_a_killed_program_comes_back_under_its_name_and_address(cluster: Cluster, name: str) -> None:
    before, pid, ids = addresses(cluster), cluster.process(name), complete(cluster)
    cluster.kill(pid)
    until_sync(lambda: cluster.process(name) != pid)
    until_sync(lambda: serves(cluster), deadline_s=60)
    assert addresses(cluster) == before
    assert complete(cluster) == ids
    until_sync(lambda: cluster.phalanx("get", "workers").returncode == 0)


def test_down_cleans_up_after_a_killed_supervisor(cluster: Cluster) -> None:
    cluster.kill(cluster.process("supervisor-0"))
    assert complete(cluster), "serving does not need the supervisor"
    refused = cluster.phalanx("up", "--model", str(cluster.model_dir))
    assert refused.returncode == 1
    assert "lost its supervisor" in refused.stderr
    pids = processes.pids(cluster.state_dir)
    assert len(pids) >= 6, "etcd, controller, worker, engine, text and gateway"

    assert cluster.phalanx("down").returncode == 0

    assert all(gone(pid) for pid in pids)
    assert processes.pids(cluster.state_dir) == []
    assert not (cluster.state_dir / "cluster.json").exists()


def test_an_up_that_cannot_get_ready_says_why_and_leaves_nothing(demo_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(demo_model, broken)
    (broken / "model.safetensors").unlink()
    cluster = Cluster(tmp_path / "state", broken)
    failed = cluster.phalanx("up", "--detach", "--model", str(broken), "--http-port", "0", "--grpc-port", "0")
    assert failed.returncode == 1
    assert "safetensors" in failed.stderr.splitlines()[-1]
    assert processes.pids(cluster.state_dir) == []
    assert not (cluster.state_dir / "cluster.json").exists()


def test_an_up_without_enough_workers_ends_with_the_reason(demo_model: Path, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, demo_model)
    shape = ["--replicas", "2", "--workers", "1", "--http-port", "0", "--grpc-port", "0"]
    failed = cluster.phalanx("up", "--detach", "--model", str(demo_model), *shape, "--timeout", "8")
    assert failed.returncode == 1
    assert "pending" in failed.stderr.splitlines()[-1]
    assert processes.pids(tmp_path) == []


def test_a_port_in_use_is_told(demo_model: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        failed = Cluster(taken, demo_model).phalanx(
            "up", "--model", str(demo_model), "--http-port", port, "--grpc-port", "0"
        )
    assert failed.returncode == 1
    assert "in use" in failed.stderr
    assert processes.pids(taken) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_a_cluster_in_the_foreground_ends_with_its_command(
    demo_model: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    """Ctrl-C stops the cluster in order. Even when the command is killed, its cluster ends."""
    ports = ["--http-port", "0", "--grpc-port", "0"]
    line = [*PHALANX, "up", "--model", str(demo_model), *ports, "--state-dir", str(tmp_path)]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as up:
        assert up.stderr is not None
        assert b"serves" in up.stderr.readline()
        pids = processes.pids(tmp_path)
        assert pids
        up.send_signal(signum)
        up.stderr.read()
    assert up.returncode == (0 if signum is signal.SIGINT else -signum)
    until_sync(lambda: not processes.pids(tmp_path))


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an etcd that runs before and after the clusters."""
    client, peer = (f"127.0.0.1:{embedded.free_port()}" for _ in range(2))
    line = embedded.command(tmp_path_factory.mktemp("etcd"), f"http://{client}", f"http://{peer}")
    with subprocess.Popen(line) as process:
        asyncio.run(embedded.wait_until_healthy(client, 20.0))
        yield client
        process.terminate()


async def write(etcd: str, operation: Operation) -> None:
    store = EtcdStore([etcd])
    await store.txn([], [operation])
    await store.close()


def left_in(etcd: str) -> list[str]:
    """The keys of every cluster."""

    async def keys() -> list[str]:
        store = EtcdStore([etcd])
        try:
            return sorted((await store.list("/phalanx/")).entries)
        finally:
            await store.close()

    return asyncio.run(keys())


def test_up_and_down_on_an_etcd_that_was_used_before(demo_model: Path, tmp_path: Path, etcd: str) -> None:
    """`up` names the deployments that it finds; `down` deletes its own deployment and no other."""
    left = DeploymentRecord("left-over", 1, "/elsewhere/model", tp=2)
    asyncio.run(write(etcd, Put(Keys().deployment(left.name), encode(left))))
    cluster = Cluster(tmp_path, demo_model)
    try:
        ports = ["--http-port", "0", "--grpc-port", "0"]
        up = cluster.phalanx("up", "--detach", "--model", str(demo_model), "--etcd", etcd, *ports)
        assert up.returncode == 0, up.stderr
        assert "warning: this cluster already has left-over" in up.stderr
        assert len([key for key in left_in(etcd) if "/deployments/" in key]) == 2
    finally:
        cluster.phalanx("down")
    assert left_in(etcd) == [Keys().deployment(left.name)]


def test_two_clusters_share_an_etcd_under_two_names(demo_model: Path, tmp_path: Path) -> None:
    with Cluster.start(demo_model, tmp_path / "one") as one:
        shared = ("--etcd", one.info()["etcd"][0], "--cluster", "second")
        with Cluster.start(demo_model, tmp_path / "two", arguments=shared) as two:
            assert complete(one) == complete(two)
            assert "etcd" not in {process["role"] for process in two.info()["processes"]}
        assert complete(one)
