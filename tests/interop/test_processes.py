"""What the processes of a running cluster have mapped, after they have served."""

from __future__ import annotations

from pathlib import Path

from tests.cluster import Cluster

# As /proc/net spells 127.0.0.1, ::1 and ::ffff:127.0.0.1.
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def mapped(pid: int) -> set[str]:
    """Names of the shared objects that a process has loaded."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name for line in lines if ".so" in line}


def has(pid: int, part: str) -> bool:
    return any(part in name for name in mapped(pid))


def test_torch_is_in_the_engine_alone_and_the_tokeniser_in_the_text_process_alone(cluster: Cluster) -> None:
    served = cluster.phalanx("generate", "--model", cluster.model, "--max-tokens", "4", "def ")
    assert served.returncode == 0, served.stderr
    (worker,) = cluster.workers()
    planes = {
        name: cluster.process(name) for name in ("gateway-0", "worker-0", "controller-0", "supervisor-0")
    }
    torch = {name for name, pid in planes.items() if has(pid, "libtorch")}
    tokenisers = {name for name, pid in planes.items() if has(pid, "tokenizers")}
    assert (torch, tokenisers) == (set(), set())
    assert has(worker["engine_pid"], "libtorch")
    assert not has(worker["engine_pid"], "tokenizers")
    assert not has(worker["engine_pid"], "cygrpc")
    assert has(worker["text_pid"], "tokenizers")
    assert not has(worker["text_pid"], "cygrpc")


def test_everything_listens_on_loopback_alone(cluster: Cluster) -> None:
    pids = {process["pid"] for process in cluster.info()["processes"]}
    (worker,) = cluster.workers()
    pids |= {worker["engine_pid"], worker["text_pid"]}
    inodes = {
        target.removeprefix("socket:[").removesuffix("]")
        for pid in pids
        for fd in Path(f"/proc/{pid}/fd").iterdir()
        if (target := str(fd.readlink())).startswith("socket:[")
    }
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].partition(":")[0])
    assert listening
    assert set(listening) <= LOOPBACK


def test_the_cluster_says_that_it_is_running(cluster: Cluster) -> None:
    again = cluster.phalanx("up", "--model", str(cluster.model_dir))
    assert again.returncode == 1
    assert cluster.http in again.stderr
    assert again.stderr.count("\n") == 1
