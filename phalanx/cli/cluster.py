"""cluster.json: what a running local cluster tells the other commands, and scripts."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "cluster.json"


@dataclass(frozen=True, slots=True)
class Process:
    """One process of the cluster."""

    role: str
    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Gateway:
    """Where a gateway listens: a URL and host:port."""

    name: str
    http: str
    grpc: str


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where a cluster listens and what it consists of. `http` is a URL, the others are host:port.

    `http` and `grpc` are the first gateway's.
    """

    http: str
    grpc: str
    gateways: tuple[Gateway, ...]
    controller: str
    etcd: tuple[str, ...]
    processes: tuple[Process, ...]


def write(state_dir: Path, cluster: Cluster) -> None:
    """Replace the file in one step, so that a reader sees the old or the new one."""
    partial = state_dir / f"{FILE}.partial"
    partial.write_text(json.dumps(asdict(cluster), indent=2) + "\n")
    os.replace(partial, state_dir / FILE)


def read(state_dir: Path) -> Cluster | None:
    """The cluster of a state directory, or None where none was started."""
    try:
        fields = json.loads((state_dir / FILE).read_text())
    except FileNotFoundError:
        return None
    processes = tuple(Process(**process) for process in fields.pop("processes"))
    gateways = tuple(Gateway(**gateway) for gateway in fields.pop("gateways"))
    return Cluster(**fields | {"etcd": tuple(fields["etcd"]), "gateways": gateways, "processes": processes})


def remove(state_dir: Path) -> None:
    """Forget the cluster; nothing happens when there is none."""
    (state_dir / FILE).unlink(missing_ok=True)
