"""Streams over two replicas of two shards each, with real processes, a real etcd and a real model.

Eight streams run, spread over both replicas. When all of them are under way, a test hurts one process.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from phalanx.client import Client
from tests.cluster import Cluster

STREAMS = 8
TOKENS = 900  # half a second of engine time: none has ended when clients see its first tokens late
HURT_AT = 4  # hurt when the slowest stream has so many tokens; the fastest is then far from its end
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


async def stream_all(
    cluster: Cluster,
    options: dict[str, Any],
    on_time: Callable[[], None] | None = None,
    hurt_at: int = HURT_AT,
) -> list[Stream]:
    """Run all streams to their ends. Calls `on_time` once, when every stream has `hurt_at` tokens."""
    options = {"max_tokens": TOKENS, "ignore_eos": True} | options
    streams = [Stream() for _ in range(STREAMS)]
    hurt = False

    async def run(client: Client, number: int) -> None:
        nonlocal hurt
        stream = streams[number]
        async for event in client.generate(cluster.model, PROMPTS[number], seed=number, **options):
            if event.HasField("chunk"):
                assert event.chunk.index == len(stream.ids), "a token was repeated or skipped"
                stream.ids += event.chunk.token_ids
                stream.text += event.chunk.text
                stream.finish = event.chunk.finish_reason or stream.finish
            elif event.HasField("finished"):
                stream.completion_tokens = event.finished.usage.completion_tokens
            if on_time and not hurt and min(len(other.ids) for other in streams) >= hurt_at:
                hurt = True
                on_time()

    gateways = [gateway["grpc"] for gateway in cluster.info()["gateways"]]
    async with Client(*gateways) as client, asyncio.TaskGroup() as group:
        for number in range(STREAMS):
            group.create_task(run(client, number))
    assert on_time is None or hurt, "the streams ended before anything had happened"
    return streams


def counter(cluster: Cluster, name: str) -> float:
    """A counter's sum over all gateways: on a busy machine a client may have gone to the second one."""
    total = 0.0
    for gateway in cluster.info()["gateways"]:
        with urllib.request.urlopen(f"{gateway['http']}/metrics") as response:
            lines = response.read().decode().splitlines()
        total += next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))
    return total


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
