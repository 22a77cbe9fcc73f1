from __future__ import annotations

import json

import pytest
import yaml
from google.protobuf.timestamp_pb2 import Timestamp

from phalanx.cli import output
from phalanx.cli.get import KINDS
from phalanx.v1 import control_pb2

FREE = control_pb2.Worker(
    worker="worker-0",
    incarnation="a",
    host="h",
    device="cpu",
    state=control_pb2.WORKER_STATE_FREE,
    server_pid=7,
)


def test_a_worker_has_every_promised_field_and_null_where_none():
    row = KINDS["workers"].row(FREE)
    promised = "worker incarnation host device state deployment replica epoch tp_rank pp_rank server_pid"
    assert set(promised.split()) | {"engine_pid", "text_pid", "address"} <= row.keys()
    assert row["server_pid"] == 7
    assert [row[name] for name in ("deployment", "epoch", "tp_rank", "engine_pid", "text_pid")] == [None] * 5


def test_rank_zero_is_a_number_not_null():
    ranked = control_pb2.Worker(worker="worker-0", tp_rank=0, pp_rank=0, epoch=0)
    row = KINDS["workers"].row(ranked)
    assert (row["tp_rank"], row["pp_rank"], row["epoch"]) == (0, 0, 0)


def test_a_deployment_shows_its_spec_beside_its_state():
    message = control_pb2.Deployment(
        spec=control_pb2.DeploymentSpec(name="m", tp=2), state=control_pb2.DEPLOYMENT_STATE_READY, revision=3
    )
    row = KINDS["deployments"].row(message)
    assert (row["name"], row["tp"], row["state"], row["revision"]) == ("m", 2, "ready", 3)


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (control_pb2.DEPLOYMENT_STATE_DEGRADED, "degraded"),
        (control_pb2.DEPLOYMENT_STATE_UNSPECIFIED, None),
        (99, "99"),
    ],
)
def test_a_state_is_a_word_in_lower_case(state: int, word: str | None):
    row = output.row(control_pb2.Deployment(state=state))  # type: ignore[arg-type]
    assert row["state"] == word
    assert json.loads(output.render([row], (), "json"))[0]["state"] == word


def test_states_inside_a_replica_are_words_too():
    shard = control_pb2.Shard(rank=0, state=control_pb2.SHARD_STATE_LOST)
    assert output.row(control_pb2.Replica(shards=[shard]))["shards"][0]["state"] == "lost"


def test_a_time_is_rfc_3339():
    message = control_pb2.Deployment(create_time=Timestamp(seconds=1_700_000_000, nanos=500_000_000))
    assert output.row(message)["create_time"] == "2023-11-14T22:13:20.500Z"
    assert output.row(control_pb2.Deployment())["create_time"] is None


def test_json_and_yaml_say_the_same():
    rows = [KINDS["workers"].row(FREE)]
    assert json.loads(output.render(rows, (), "json")) == rows
    assert yaml.safe_load(output.render(rows, (), "yaml")) == rows


def test_a_table_aligns_its_columns():
    rows = [{"name": "a", "engine_pid": None}, {"name": "longer", "engine_pid": 12}]
    assert output.table(rows, ("name", "engine_pid")) == "NAME     ENGINE PID\na        -\nlonger   12"
