"""A Node client (`@grpc/grpc-js`) against our gRPC."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster

HERE = Path(__file__).parent
PROTOS = HERE.parents[1] / "protos"
TOKENS = 24
OFFLINE = ("ENOTFOUND", "ECONNREFUSED", "ETIMEDOUT", "EAI_AGAIN")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of the Node client, installed into a folder of its own."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("Node and npm are not on PATH")
    folder = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(HERE / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    installed = subprocess.run(
        [npm, "ci", "--omit-lockfile-registry-resolved", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
    )
    if installed.returncode and any(code in installed.stderr for code in OFFLINE):
        pytest.skip("npm reaches no package registry")
    assert installed.returncode == 0, installed.stderr
    return [node, str(folder / "generate.js"), str(PROTOS)]


def generate(client: list[str], target: str, request: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    # A proxy of the environment is not for loopback.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(
        [*client, target, json.dumps(request)], capture_output=True, text=True, timeout=60, env=environment
    )


def test_a_completion_streams_to_node(client: list[str], cluster: Cluster) -> None:
    request = {
        "model": cluster.model,
        "text": "def ",
        "sampling": {"temperature": 0.8, "seed": 7},
        "stopping": {"max_tokens": TOKENS, "ignore_eos": True},
    }
    done = generate(client, cluster.grpc, request)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["event"] == "started"
    assert events[-1]["event"] == "finished"
    assert events[-1]["finished"]["usage"]["completion_tokens"] == TOKENS
    chunks = [event["chunk"] for event in events if event["event"] == "chunk"]
    assert sum(len(chunk["token_ids"]) for chunk in chunks) == TOKENS
    assert [chunk["index"] for chunk in chunks] == [
        sum(len(earlier["token_ids"]) for earlier in chunks[:i]) for i in range(len(chunks))
    ]
    assert chunks[-1]["finish_reason"] == "FINISH_REASON_LENGTH"


def test_an_error_reaches_node_with_its_status(client: list[str], cluster: Cluster) -> None:
    done = generate(client, cluster.grpc, {"model": "nobody", "text": "x"})
    assert done.returncode == 1
    assert json.loads(done.stderr)["code"] == "NOT_FOUND"
