"""cluster.json: the addresses and processes of a running local cluster, for commands and scripts."""

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
    """A gateway's addresses: `http` is a URL, `grpc` is host:port."""

    name: str
    http: str
    grpc: str


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster's addresses and processes. `http` is a URL; the other addresses are host:port.

    `http` and `grpc` are those of the first gateway.
    """

    http: str
    grpc: str
    gateways: tuple[Gateway, ...]
    controller: str
    etcd: tuple[str, ...]
    processes: tuple[Process, ...]


def write(state_dir: Path, cluster: Cluster) -> None:
    """Replace the file atomically: a reader sees the old or the new content."""
    partial = state_dir / f"{FILE}.partial"
    partial.write_text(json.dumps(asdict(cluster), indent=2) + "\n")
    os.replace(partial, state_dir / FILE)


def read(state_dir: Path) -> Cluster | None:
    """The cluster of a state directory; None when the directory has none."""
    try:
        fields = json.loads((state_dir / FILE).read_text())
    except FileNotFoundError:
        return None
    processes = tuple(Process(**process) for process in fields.pop("processes"))
    gateways = tuple(Gateway(**gateway) for gateway in fields.pop("gateways"))
    return Cluster(**fields | {"etcd": tuple(fields["etcd"]), "gateways": gateways, "processes": processes})


def remove(state_dir: Path) -> None:
    """Remove the file if there is one."""
    (state_dir / FILE).unlink(missing_ok=True)
