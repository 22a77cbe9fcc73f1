"""SIGKILL under load: no stream notices."""

from __future__ import annotations

import asyncio
import json

import pytest

from phalanx.v1 import types_pb2
from tests.cluster import Cluster
from tests.faults.streams import (
    MODES,
    TOKENS,
    VICTIMS,
    Stream,
    counter,
    has_come_back,
    shards,
    stream_all,
)
from tests.until import until_sync

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ranks": {"type": "array", "items": {"type": "integer"}, "minItems": 30, "maxItems": 40},
        "kind": {"enum": ["hoplite", "sarissa"]},
    },
    "required": ["name", "ranks", "kind"],
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("victim", "mode"), list(zip(VICTIMS, [*MODES, *reversed(MODES)], strict=True)))
def test_no_stream_notices_a_kill(
    cluster: Cluster, undisturbed: dict[str, list[Stream]], victim: str, mode: str
) -> None:
    replica = f"{cluster.model}-{len(victim) % 2}"
    before = shards(cluster, replica)
    failovers = counter(cluster, "phalanx_failovers_total")

    kill = VICTIMS[victim](before)
    disturbed = asyncio.run(stream_all(cluster, MODES[mode], lambda: cluster.kill(kill)))

    assert disturbed == undisturbed[mode]
    assert all(len(stream.ids) == stream.completion_tokens == TOKENS for stream in disturbed)
    assert counter(cluster, "phalanx_failovers_total") > failovers, "nothing was running where it was killed"
    assert counter(cluster, "phalanx_failed_total") == 0

    epoch = max(worker["epoch"] for worker in before)
    until_sync(lambda: has_come_back(cluster, replica, epoch), deadline_s=60)
    again = asyncio.run(stream_all(cluster, MODES[mode]))
    assert again == undisturbed[mode]


@pytest.mark.timeout(180)
def test_answers_under_a_schema_survive_the_death_of_their_leader(cluster: Cluster) -> None:
    options = {"temperature": 1.0, "max_tokens": 900, "json_schema": json.dumps(SCHEMA)}
    whole = asyncio.run(stream_all(cluster, options))
    for stream in whole:
        assert stream.finish == types_pb2.FINISH_REASON_STOP
        answer = json.loads(stream.text)
        assert answer.keys() == {"name", "ranks", "kind"}
        assert len(answer["name"]) <= 12
        assert 30 <= len(answer["ranks"]) <= 40
        assert all(type(rank) is int for rank in answer["ranks"])
        assert answer["kind"] in ("hoplite", "sarissa")

    before = shards(cluster, f"{cluster.model}-0")
    failovers = counter(cluster, "phalanx_failovers_total")
    leader = VICTIMS["the leader's engine"](before)
    assert asyncio.run(stream_all(cluster, options, lambda: cluster.kill(leader))) == whole
    assert counter(cluster, "phalanx_failovers_total") > failovers
    epoch = max(worker["epoch"] for worker in before)
    until_sync(lambda: has_come_back(cluster, f"{cluster.model}-0", epoch), deadline_s=60)
