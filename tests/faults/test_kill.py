"""SIGKILL under load, with real processes, a real etcd and a real model: no stream notices.

Two replicas of two shards each. Eight streams run, spread over both; one process of one replica is
killed while all of them are under way.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from phalanx.client import Client
from phalanx.v1 import types_pb2
from tests.cluster import Cluster
from tests.until import until_sync

STREAMS = 8
TOKENS = 400  # a quarter of a second of the engine's time: it must not have ended when a client is slow
KILL_AT = 4  # of the slowest stream; the fastest is then far from its end
PROMPTS = [
    "def __init__(self",
    "import ",
    "class Parser",
    "    return ",
    "    if not isinstance(",
    "raise ValueError(",
    "for key, value in ",
    "try:\n    import",
]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {
        "temperature": 0.9,
        "top_p": 0.95,
        "top_k": 200,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.1,
        "logit_bias": {40: 1.5},
        "bad_words": ["self", "return"],
        "min_tokens": 20,
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "ranks": {"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 80},
        "kind": {"enum": ["hoplite", "sarissa"]},
    },
    "required": ["name", "ranks", "kind"],
}

Worker = dict[str, Any]
VICTIMS: dict[str, Callable[[list[Worker]], int]] = {
    "the leader's engine": lambda shards: shards[0]["engine_pid"],
    "a follower's engine": lambda shards: shards[1]["engine_pid"],
    "the leader's worker": lambda shards: shards[0]["server_pid"],
    "a follower's worker": lambda shards: shards[1]["server_pid"],
}


@dataclass
class Stream:
    """What one client has received."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: int = 0
    completion_tokens: int = 0


@pytest.fixture(scope="module")
def cluster(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster.start(demo_model, tmp_path_factory.mktemp("faults"), replicas=2, tp=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> dict[str, list[Stream]]:
    """Every mode's streams in a cluster that nobody hurts."""
    return {mode: asyncio.run(stream_all(cluster, options)) for mode, options in MODES.items()}


async def stream_all(
    cluster: Cluster, options: dict[str, Any], on_kill: Callable[[], None] | None = None
) -> list[Stream]:
    """Run all streams to their ends; `on_kill` is called once, when every one has `KILL_AT` tokens."""
    options = {"max_tokens": TOKENS, "ignore_eos": True} | options
    streams = [Stream() for _ in range(STREAMS)]
    killed = False

    async def run(client: Client, number: int) -> None:
        nonlocal killed
        stream = streams[number]
        async for event in client.generate(cluster.model, PROMPTS[number], seed=number, **options):
            if event.HasField("chunk"):
                assert event.chunk.index == len(stream.ids), "a token was repeated or skipped"
                stream.ids += event.chunk.token_ids
                stream.text += event.chunk.text
                stream.finish = event.chunk.finish_reason or stream.finish
            elif event.HasField("finished"):
                stream.completion_tokens = event.finished.usage.completion_tokens
            if on_kill and not killed and min(len(other.ids) for other in streams) >= KILL_AT:
                killed = True
                on_kill()

    async with Client(cluster.grpc) as client, asyncio.TaskGroup() as group:
        for number in range(STREAMS):
            group.create_task(run(client, number))
    assert on_kill is None or killed, "the streams ended before anything was killed"
    return streams


def counter(cluster: Cluster, name: str) -> float:
    with urllib.request.urlopen(f"{cluster.http}/metrics") as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def replicas_reached(cluster: Cluster) -> int:
    with urllib.request.urlopen(f"{cluster.http}/v1/models") as response:
        return sum(model["ready_replicas"] for model in json.load(response)["data"])


def shards(cluster: Cluster, replica: str) -> list[Worker]:
    mine = [worker for worker in cluster.workers() if worker["replica"] == replica]
    return sorted(mine, key=lambda worker: (worker["pp_rank"], worker["tp_rank"]))


def has_come_back(cluster: Cluster, replica: str, epoch: int) -> bool:
    mine = shards(cluster, replica)
    ready = [worker for worker in mine if worker["state"] == "ready" and worker["epoch"] > epoch]
    return len(ready) == 2 and replicas_reached(cluster) == 2


@pytest.mark.timeout(180)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("victim", VICTIMS)
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
        assert 60 <= len(answer["ranks"]) <= 80
        assert all(type(rank) is int for rank in answer["ranks"])
        assert answer["kind"] in ("hoplite", "sarissa")

    before = shards(cluster, f"{cluster.model}-0")
    failovers = counter(cluster, "phalanx_failovers_total")
    leader = VICTIMS["the leader's engine"](before)
    assert asyncio.run(stream_all(cluster, options, lambda: cluster.kill(leader))) == whole
    assert counter(cluster, "phalanx_failovers_total") > failovers
    epoch = max(worker["epoch"] for worker in before)
    until_sync(lambda: has_come_back(cluster, f"{cluster.model}-0", epoch), deadline_s=60)
