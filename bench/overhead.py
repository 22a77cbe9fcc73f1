"""what it costs that streams outlive their gateway: with and without that, in turns on one cluster

Two gateways serve the same replicas. One runs with --no-resumable: etcd keeps no checkpoints of its streams,
and leaders keep no output of them. Clients stream from both gateways in turn.

Tokens per second, and CPU time per token, change with the other load of the machine. The extra work is done
by the "keepers": gateways, workers, controller and etcd. Engines, text processes and clients do the same work
either way, in the same seconds on the same cores. So the steadiest figure is a ratio: the CPU time of all
processes, divided by that of engines, text processes and clients.
Example: python -m bench.overhead --rounds 100
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phalanx.cli import cluster
from phalanx.cli.demo import two_replicas
from phalanx.client import Client

STREAMS = 16


@contextmanager
def gateway(etcd: str, name: str, *options: str) -> Iterator[tuple[str, int]]:
    """Start another gateway on a running cluster; yields its host:port and process id."""
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
            yield json.loads(pipe.readline())["grpc"], process.pid
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True, slots=True)
class Cost:
    """What one round of streams cost."""

    tokens_per_s: float
    cpu_ms_per_token: float
    keepers_ms_per_token: float  # CPU time of gateways, workers, controller and etcd

    @property
    def cpu_by_others(self) -> float:
        """CPU time of all processes, divided by that of engines, text processes and clients."""
        return self.cpu_ms_per_token / (self.cpu_ms_per_token - self.keepers_ms_per_token)


def spent_s(pids: Iterable[int]) -> float:
    """CPU time of these processes since they started."""
    threads = [path for pid in pids for path in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((path / "schedstat").read_text().split()[0]) for path in threads) / 1e9


def busy_s() -> float:
    """CPU time of the whole machine since it booted."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


async def cost(target: str, model: str, max_tokens: int, keepers: Sequence[int]) -> Cost:
    """Run all streams at once, from the first request to the last token; `keepers` are process ids."""

    async def run(client: Client, seed: int) -> int:
        options = {"max_tokens": max_tokens, "ignore_eos": True, "seed": seed}
        return sum([len(event.chunk.token_ids) async for event in client.generate(model, "def ", **options)])

    async with Client(target) as client:
        began, busy, spent = time.monotonic(), busy_s(), spent_s(keepers)
        tokens = sum(await asyncio.gather(*(run(client, seed) for seed in range(STREAMS))))
        return Cost(
            tokens / (time.monotonic() - began),
            (busy_s() - busy) / tokens * 1000,
            (spent_s(keepers) - spent) / tokens * 1000,
        )


async def measure(
    running: cluster.Cluster, model: str, options: argparse.Namespace
) -> list[tuple[Cost, Cost]]:
    """The cost with and without, for each round. The one that goes first alternates."""
    etcd, rounds = ",".join(running.etcd), []
    with gateway(etcd, "with") as kept, gateway(etcd, "without", "--no-resumable") as bare:
        targets = {"with": kept[0], "without": bare[0]}
        keepers = [kept[1], bare[1], *(each.pid for each in running.processes if each.role != "supervisor")]
        for target in targets.values():
            await ready(target, model)
            await cost(target, model, 50, keepers)
        for number in range(options.rounds):
            order = ["with", "without"] if number % 2 else ["without", "with"]
            costs = {name: await cost(targets[name], model, options.max_tokens, keepers) for name in order}
            rounds.append((costs["with"], costs["without"]))
            for name, each in costs.items():
                print(
                    f"  {name}: {each.tokens_per_s:.0f} tokens/s, {each.cpu_ms_per_token:.3f} ms, "
                    f"of it {each.keepers_ms_per_token:.3f} ms to keep streams",
                    flush=True,
                )
    return rounds


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
        rounds = asyncio.run(measure(running, options.model.name, options))
    print(f"{len(rounds)} rounds of {STREAMS} streams, with against without:")
    print(f"  tokens/s {change([one.tokens_per_s / other.tokens_per_s for one, other in rounds])}")
    cpu = [one.cpu_ms_per_token / other.cpu_ms_per_token for one, other in rounds]
    print(f"  CPU time per token {change(cpu)}")
    kept = [one.cpu_by_others / other.cpu_by_others for one, other in rounds]
    print(f"  CPU time by that of engines, text and clients {change(kept)}")


def change(ratios: Sequence[float]) -> str:
    """The median of ratios as a change, with its confidence interval of 95 % by order statistics."""
    ordered = sorted((ratio - 1) * 100 for ratio in ratios)
    text = f"{statistics.median(ordered):+.2f} %"
    outside = interval_rank(len(ordered))
    if outside is None:
        return f"{text} (of too few rounds for an interval)"
    return f"{text} (95 % confidence: {ordered[outside]:+.2f} to {ordered[-1 - outside]:+.2f} %)"


def interval_rank(count: int) -> int | None:
    """How many of `count` sorted values lie below the 95 % interval of their median, and how many above.

    None where there are too few values. The probability that fewer than k values lie below the median is the
    probability that `count` tosses of a fair coin show fewer than k heads.
    """
    below, outside = 0.0, None
    for heads in range(count // 2):
        below += math.comb(count, heads) / 2**count
        if below > 0.025:
            break
        outside = heads
    return outside


if __name__ == "__main__":
    main()
