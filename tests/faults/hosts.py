"""A cluster on two hosts, near and far, that are network namespaces of this machine; the wire can be cut.

Near is the machine itself. It runs etcd, the controller, the gateway and all workers but one. Far runs the
last worker, in a process namespace of its own, so that its ranks cannot share memory with the others.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.cli.local.embedded_etcd import command, free_port
from tests.cluster import PHALANX, Cluster

NEAR, FAR = "198.18.77.1", "198.18.77.2"  # of the range for tests of network devices (RFC 2544)


@functools.cache
def missing() -> str:
    """Why namespaces cannot be made here; empty when they can."""
    if shutil.which("ip") is None:
        return "there is no `ip` command (Debian: iproute2)"
    name = f"phalanx-{os.getpid()}-tried"
    for line in (
        ["unshare", "--net", "--pid", "--fork", "true"],
        ["ip", "netns", "add", name],
        ["ip", "netns", "delete", name],
    ):
        tried = subprocess.run(line, capture_output=True, text=True)
        if tried.returncode != 0:
            return f"namespaces cannot be made: {tried.stderr.strip()}"
    return ""


@dataclass(frozen=True, slots=True)
class Wire:
    """The connection between the hosts. When cut it drops packets without an error, like a broken switch."""

    namespace: str
    end: str

    def cut(self) -> None:
        """Drop every packet."""
        _ip("-n", self.namespace, "link", "set", self.end, "down")

    def mend(self) -> None:
        """Let packets pass again."""
        _ip("-n", self.namespace, "link", "set", self.end, "up")


@contextlib.contextmanager
def wire() -> Iterator[Wire]:
    """Create the far host and the wire to it."""
    name = f"phalanx-{os.getpid()}"
    near, far = f"px{os.getpid()}n", f"px{os.getpid()}f"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        _ip("address", "add", f"{NEAR}/24", "dev", near)
        _ip("link", "set", near, "up")
        _ip("-n", name, "address", "add", f"{FAR}/24", "dev", far)
        for device in ("lo", far):
            _ip("-n", name, "link", "set", device, "up")
        yield Wire(name, far)
    finally:
        subprocess.run(["ip", "link", "delete", near], capture_output=True)
        _ip("netns", "delete", name)


class TwoHosts(Cluster):
    """A cluster that was started without `phalanx up`."""

    def phalanx(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the `phalanx` command on this cluster's controller."""
        line = [*PHALANX, *arguments, "--controller", self.info()["controller"]]
        return subprocess.run(line, capture_output=True, text=True, timeout=60)


@contextlib.contextmanager
def two_hosts(model: Path, state_dir: Path, wire: Wire, near_workers: int) -> Iterator[Cluster]:
    """Start the cluster, with nothing deployed."""
    (state_dir / "logs").mkdir()
    python = [sys.executable, "-m"]
    with contextlib.ExitStack() as stack:

        def start(name: str, line: list[str]) -> None:
            log = stack.enter_context((state_dir / "logs" / f"{name}.log").open("wb"))
            process = subprocess.Popen(line, stdout=log, stderr=log, pass_fds=_descriptors(line))
            stack.callback(process.wait)
            stack.callback(process.kill)

        def announced(name: str, line: list[str]) -> dict[str, str]:
            reader, writer = os.pipe()
            start(name, [*line, "--ready-fd", str(writer)])
            os.close(writer)
            with os.fdopen(reader) as pipe:
                return dict(json.loads(pipe.readline()))

        etcd, peer = f"{NEAR}:{free_port()}", f"http://127.0.0.1:{free_port()}"
        start("etcd", command(state_dir / "etcd", f"http://{etcd}", peer))
        store = ["--etcd", etcd]
        controller = announced("controller", [*python, "controlplane.main", *store])
        for number in range(near_workers):
            name = f"near-{number}"
            line = [*python, "dataplane.shard.main", *store, "--name", name, "--host", "near"]
            start(name, [*line, "--listen", f"{NEAR}:0"])
        apart = ["ip", "netns", "exec", wire.namespace]
        apart += ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        line = [*apart, *python, "dataplane.shard.main", *store, "--name", "far", "--host", "far"]
        start("far", [*line, "--listen", f"{FAR}:0"])
        gateway: dict[str, Any] = announced("gateway", [*python, "dataplane.gateway.main", *store])
        info = {
            **gateway,
            "gateways": [{"name": "gateway-0", **gateway}],
            "controller": controller["grpc"],
            "etcd": [etcd],
            "processes": [],
        }
        (state_dir / "cluster.json").write_text(json.dumps(info))
        yield TwoHosts(state_dir, model)


def _descriptors(line: list[str]) -> list[int]:
    return [int(line[-1])] if line[-2] == "--ready-fd" else []


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
