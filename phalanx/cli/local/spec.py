"""The programs of a local cluster, and the command line of each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

CONTROLLER = "controller-0"
ETCD = "etcd-0"


@dataclass(frozen=True, slots=True)
class LocalSpec:
    """The shape of a local cluster. Port 0 lets the program choose a free port.

    `etcd`: endpoints of an existing etcd; empty starts one. `cluster`: the cluster's name within etcd.
    """

    state_dir: str
    workers: int
    gateways: int = 1
    device: str = "cpu"
    devices: int = 1
    http_port: int = 0
    grpc_port: int = 0
    etcd: tuple[str, ...] = ()
    cluster: str = "default"

    def to_json(self) -> str:
        """The spec as one command line argument."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> LocalSpec:
        """The spec in a command line argument."""
        fields = json.loads(text)
        return LocalSpec(**fields | {"etcd": tuple(fields["etcd"])})


@dataclass(frozen=True, slots=True)
class Program:
    """One process of the cluster. It starts once every program in `after` has served.

    Programs stop in the order of `stop_stage`; programs of the same stage stop together.
    """

    name: str
    role: str
    after: tuple[str, ...] = ()
    stop_stage: int = 0


Addresses = Mapping[str, str]


def programs(spec: LocalSpec) -> tuple[Program, ...]:
    """Every program of a cluster, in starting order."""
    etcd = () if spec.etcd else (Program(ETCD, "etcd", stop_stage=3),)
    after = tuple(program.name for program in etcd)
    return (
        *etcd,
        # Stops before the workers: an active controller would form their replicas again as they stop.
        Program(CONTROLLER, "controller", after, stop_stage=1),
        *(Program(f"worker-{i}", "worker", after, stop_stage=2) for i in range(spec.workers)),
        *(Program(name, "gateway", after, stop_stage=0) for name in gateways(spec)),
    )


def gateways(spec: LocalSpec) -> list[str]:
    """The names of the gateways. The first one gets the requested ports."""
    return [f"gateway-{i}" for i in range(spec.gateways)]


def command(spec: LocalSpec, program: Program, known: Mapping[str, Addresses], ready_fd: int) -> list[str]:
    """The command line of a program other than etcd.

    `known` has the addresses that each program announced when it first served. A restarted program listens
    on the same addresses.
    """
    own = known.get(program.name, {})
    etcd = spec.etcd or (known[ETCD]["grpc"],)
    line = [sys.executable, "-P", "-m", _MODULES[program.role]]
    line += ["--etcd", ",".join(etcd), "--cluster", spec.cluster, "--name", program.name]
    if program.role == "gateway":
        first = program.name == gateways(spec)[0]
        grpc_port, http_port = (spec.grpc_port, spec.http_port) if first else (0, 0)
        line += ["--grpc", own.get("grpc", f"127.0.0.1:{grpc_port}")]
        line += ["--drain-s", "1"]
        line += ["--http", own.get("http", f"127.0.0.1:{http_port}").removeprefix("http://")]
    else:
        line += ["--listen", own.get("grpc", "127.0.0.1:0")]
    if program.role == "worker":
        index = int(program.name.rpartition("-")[2])
        line += ["--drain-s", "1"]
        line += ["--device", "cpu" if spec.device == "cpu" else f"cuda:{index % spec.devices}"]
    return [*line, "--ready-fd", str(ready_fd)]


_MODULES = {
    "controller": "controlplane.main",
    "worker": "dataplane.shard",
    "gateway": "dataplane.gateway.main",
}


def environment(spec: LocalSpec, base: Mapping[str, str], cores: int) -> dict[str, str]:
    """The environment of every program. CPU workers get equal shares of the cores as threads."""
    shared = {"OMP_NUM_THREADS": str(max(1, cores // spec.workers)), "OMP_WAIT_POLICY": "passive"}
    return {**(shared if spec.device == "cpu" else {}), **base, "PYTHONUNBUFFERED": "1", MARK: spec.state_dir}


MARK = "PHALANX_LOCAL_CLUSTER"  # environment variable that marks the processes of a cluster


def log_path(spec: LocalSpec, name: str) -> Path:
    """The log file of a program."""
    return Path(spec.state_dir) / "logs" / f"{name}.log"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
