"""what it costs that streams outlive their gateway: tokens/s with and without, in turns on one cluster

Two gateways serve the same replica; one keeps nothing for others. Clients stream from each in turn.
Example: python -m bench.overhead --rounds 20
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phalanx.cli import cluster
from phalanx.cli.demo import two_replicas
from phalanx.client import Client

STREAMS = 16


@contextmanager
def gateway(etcd: str, name: str, *options: str) -> Iterator[str]:
    """A gateway of its own on a running cluster; yields host:port."""
    reader, writer = os.pipe()
    line = [sys.executable, "-m", "dataplane.gateway.main", "--etcd", etcd, "--name", name]
    process = subprocess.Popen(
        [*line, "--ready-fd", str(writer), "--drain-s", "0", *options],
        pass_fds=[writer],
        stderr=subprocess.DEVNULL,
    )
    os.close(writer)
    try:
        with os.fdopen(reader) as pipe:
            yield json.loads(pipe.readline())["grpc"]
    finally:
        process.terminate()
        process.wait()


async def tokens_per_s(target: str, model: str, max_tokens: int) -> float:
    """All streams together, from the first request to the last token."""

    async def run(client: Client, seed: int) -> int:
        options = {"max_tokens": max_tokens, "ignore_eos": True, "seed": seed}
        return sum([len(event.chunk.token_ids) async for event in client.generate(model, "def ", **options)])

    async with Client(target) as client:
        began = time.monotonic()
        counts = await asyncio.gather(*(run(client, seed) for seed in range(STREAMS)))
        return sum(counts) / (time.monotonic() - began)


async def measure(running: cluster.Cluster, model: str, options: argparse.Namespace) -> list[float]:
    """With divided by without, of each round; who goes first alternates."""
    etcd, ratios = ",".join(running.etcd), []
    with gateway(etcd, "with") as kept, gateway(etcd, "without", "--no-resumable") as bare:
        targets = {"with": kept, "without": bare}
        for target in targets.values():
            await ready(target, model)
            await tokens_per_s(target, model, 50)
        for number in range(options.rounds):
            order = ["with", "without"] if number % 2 else ["without", "with"]
            rates = {name: await tokens_per_s(targets[name], model, options.max_tokens) for name in order}
            ratios.append(rates["with"] / rates["without"])
            print(f"  with {rates['with']:.0f}, without {rates['without']:.0f} tokens/s", flush=True)
    return ratios


async def ready(target: str, model: str) -> None:
    """Wait until a gateway reaches both replicas."""
    async with Client(target) as client, asyncio.timeout(30):
        reached = 0
        while reached < 2:
            reached = sum([each.ready_replicas for each in await client.models() if each.name == model])
            await asyncio.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(".phalanx/demo-model"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, two_replicas(options.model, Path(folder)) as running:
        ratios = asyncio.run(measure(running, options.model.name, options))
    quarters = statistics.quantiles(ratios, n=4)
    print(
        f"{len(ratios)} rounds of {STREAMS} streams: {(quarters[1] - 1) * 100:+.1f} % tokens/s "
        f"(quartiles {(quarters[0] - 1) * 100:+.1f} and {(quarters[2] - 1) * 100:+.1f} %)"
    )


if __name__ == "__main__":
    main()
