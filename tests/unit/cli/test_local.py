"""The parts of a local cluster that touch files and processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.cli import cluster
from phalanx.cli.failure import Failure
from phalanx.cli.local import lock, processes
from phalanx.cli.local.logtail import exit_reason
from phalanx.cli.local.spec import ETCD, MARK, LocalSpec, command, environment, programs
from phalanx.cli.local.stop import stop
from phalanx.cli.up import deployment_name

KNOWN = {ETCD: {"grpc": "127.0.0.1:1"}}
GATEWAYS = (cluster.Gateway("gateway-0", "http://h:1", "h:2"),)


def sleeper(state_dir: Path, program: str = "import time; time.sleep(600)") -> subprocess.Popen[bytes]:
    environ = {**os.environ, MARK: str(state_dir)}
    return subprocess.Popen([sys.executable, "-c", program], env=environ, stdout=subprocess.PIPE)


def test_cluster_json_is_what_scripts_expect(tmp_path: Path):
    written = cluster.Cluster(
        "http://h:1", "h:2", GATEWAYS, "h:3", ("h:4",), (cluster.Process("etcd", "etcd-0", 5),)
    )
    cluster.write(tmp_path, written)
    assert json.loads((tmp_path / "cluster.json").read_text()) == {
        "http": "http://h:1",
        "grpc": "h:2",
        "gateways": [{"name": "gateway-0", "http": "http://h:1", "grpc": "h:2"}],
        "controller": "h:3",
        "etcd": ["h:4"],
        "processes": [{"role": "etcd", "name": "etcd-0", "pid": 5}],
    }
    assert cluster.read(tmp_path) == written


def test_a_program_listens_again_where_it_first_served():
    spec = LocalSpec("/d", workers=1, http_port=0)
    gateway = next(program for program in programs(spec) if program.role == "gateway")
    first = command(spec, gateway, KNOWN, 9)
    assert first[first.index("--http") + 1] == "127.0.0.1:0"
    served = {"gateway-0": {"grpc": "127.0.0.1:7", "http": "http://127.0.0.1:8"}}
    again = command(spec, gateway, {**KNOWN, **served}, 9)
    assert again[again.index("--http") + 1] == "127.0.0.1:8"
    assert again[again.index("--grpc") + 1] == "127.0.0.1:7"


def test_the_first_gateway_has_the_ports_that_were_asked_for():
    spec = LocalSpec("/d", workers=1, gateways=2, http_port=8000, grpc_port=8001)
    first, second = (
        command(spec, program, KNOWN, 9) for program in programs(spec) if program.role == "gateway"
    )
    assert first[first.index("--grpc") + 1] == "127.0.0.1:8001"
    assert second[second.index("--grpc") + 1] == "127.0.0.1:0"
    assert second[second.index("--http") + 1] == "127.0.0.1:0"


def test_workers_are_spread_over_the_devices():
    spec = LocalSpec("/d", workers=4, device="cuda", devices=2)
    lines = [command(spec, program, KNOWN, 9) for program in programs(spec) if program.role == "worker"]
    assert [line[line.index("--device") + 1] for line in lines] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


def test_an_existing_etcd_is_used_and_none_started():
    spec = LocalSpec("/d", workers=1, etcd=("a:1", "b:2"))
    assert "etcd" not in {program.role for program in programs(spec)}
    line = command(spec, programs(spec)[0], {}, 9)
    assert line[line.index("--etcd") + 1] == "a:1,b:2"


def test_cpu_workers_share_the_cores():
    spec = LocalSpec("/d", workers=4)
    assert environment(spec, {}, cores=16)["OMP_NUM_THREADS"] == "4"
    assert environment(spec, {}, cores=2)["OMP_NUM_THREADS"] == "1"
    assert environment(spec, {"OMP_NUM_THREADS": "3"}, cores=2)["OMP_NUM_THREADS"] == "3"


def test_the_lock_has_one_holder_and_ends_with_it(tmp_path: Path):
    fd = lock.take(tmp_path)
    assert fd is not None
    lock.sign(fd)
    assert lock.take(tmp_path) is None
    assert lock.holder(tmp_path) == os.getpid()
    os.close(fd)
    again = lock.take(tmp_path)
    assert again is not None
    os.close(again)


def test_a_stranger_is_no_member(tmp_path: Path):
    """A pid from an old cluster.json may belong to somebody else by now."""
    other = sleeper(tmp_path / "other")
    try:
        with processes.member(tmp_path, other.pid) as found:
            assert found is None
        assert processes.pids(tmp_path) == []
        assert stop(tmp_path) == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()
    with processes.member(tmp_path, other.pid) as found:
        assert found is None


def test_stop_ends_what_ignores_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("phalanx.cli.local.stop.STRAYS_WITHIN_S", 0.0)
    ignoring = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    stubborn = sleeper(tmp_path, ignoring)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    assert stop(tmp_path) == 1
    stubborn.communicate()
    assert stubborn.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("last", "code", "says"),
    [
        (
            '{"event": "stopping", "exception": "Traceback:\\n  x\\nOSError: in use"}',
            1,
            "exited with code 1: OSError: in use",
        ),
        ('{"level": "error", "event": "no such device"}', 3, "exited with code 3: no such device"),
        ("Segmentation fault", -11, "was killed by SIGSEGV: Segmentation fault"),
        ('{"level": "info", "event": "serving"}', -9, "was killed by SIGKILL"),
        ("", -9, "was killed by SIGKILL"),
    ],
)
def test_an_exit_is_told_with_its_last_words(tmp_path: Path, last: str, code: int, says: str):
    path = tmp_path / "worker-0.log"
    path.write_text(f"earlier\n{last}\n" if last else "")
    assert exit_reason("worker-0", code, path) == f"worker-0 {says} (log: {path})"


def test_a_deployment_is_named_after_its_directory():
    assert deployment_name(Path("/models/Llama 3.2_1B")) == "llama-3.2-1b"
    with pytest.raises(Failure):
        deployment_name(Path("/___"))
