"""The command lines and the environment of the programs of a local cluster."""

from __future__ import annotations

from phalanx.cli.local.spec import ETCD, LocalSpec, command, environment, programs

KNOWN = {ETCD: {"grpc": "127.0.0.1:1"}}


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
