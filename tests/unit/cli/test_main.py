from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner

from phalanx.cli.failure import UNREACHABLE, USAGE
from phalanx.cli.main import main


@pytest.mark.parametrize(
    "name",
    ["up", "down", "apply", "get", "delete", "generate", "check-model", "shard-model", "demo-model", "demo"],
)
def test_every_command_explains_itself(name: str):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_help_loads_neither_grpc_nor_torch():
    """The command must answer at once."""
    code = """
import sys
from click.testing import CliRunner
from phalanx.cli.main import main
CliRunner().invoke(main, ["--help"])
print(sorted({"grpc", "torch", "rich", "yaml"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_a_cluster_commands_say_so(tmp_path):
    result = CliRunner().invoke(main, ["get", "workers", "--state-dir", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (UNREACHABLE, "")
    assert "nothing is running" in result.stderr


def test_a_stale_cluster_is_recognised(tmp_path):
    from phalanx.cli import cluster

    cluster.write(tmp_path, cluster.Cluster("http://h:1", "h:2", (), "h:3", ("h:4",), ()))
    result = CliRunner().invoke(main, ["get", "workers", "--state-dir", str(tmp_path)])
    assert result.exit_code == UNREACHABLE
    assert "is gone" in result.stderr


def test_a_controller_that_does_not_answer_is_unreachable(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        result = CliRunner().invoke(main, ["get", "workers", "--controller", target])
    assert result.exit_code == UNREACHABLE
    assert target in result.stderr


def test_an_unknown_kind_is_wrong_usage():
    assert CliRunner().invoke(main, ["get", "soldiers"]).exit_code == USAGE


def test_down_without_a_cluster_is_no_failure(tmp_path):
    result = CliRunner().invoke(main, ["down", "--state-dir", str(tmp_path)])
    assert result.exit_code == 0
    assert "nothing is running" in result.stdout
