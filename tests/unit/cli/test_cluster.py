"""cluster.json, which other commands and scripts read."""

from __future__ import annotations

import json
from pathlib import Path

from phalanx.cli import cluster

GATEWAYS = (cluster.Gateway("gateway-0", "http://h:1", "h:2"),)


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
