"""Injects faults into a real cluster under load, again and again, and checks every stream from outside.

A repetition waits until all streams are under way and injects one fault. Then it measures when the store
shows the fault, the longest gap of each client, and when the replica serves again. Every answer is compared
with the undisturbed answer to the same request.

Example: python -m tests.chaos --faults engine-kill worker-kill --repetitions 20 --report chaos
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path

from phalanx.store.etcd import EtcdStore
from tests.chaos import timeline
from tests.chaos.check import Verdict, check, longest_gap, percentile
from tests.chaos.faults import FAULTS, Injury, Scene
from tests.chaos.load import Load, undisturbed
from tests.chaos.observer import Observer
from tests.cluster import Cluster
from tests.faults.hurt import forget_limits

HEALED_WITHIN_S = 90.0
UNDER_WAY_WITHIN_S = 60.0
LOG_CHARS = 1_000_000  # of each process


@dataclass(slots=True)
class Repetition:
    """One fault and its effects: when the store showed it, when the replica served again, the clients' gaps.

    Times are seconds after the fault; `at` is on the monotonic clock.
    """

    fault: str
    what: str
    at: float
    noticed_s: float | None = None
    reformed_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)


async def repeat(scene: Scene, load: Load, fault: str) -> Repetition:
    """Inject one fault and wait until the cluster is whole again."""
    async with asyncio.timeout(UNDER_WAY_WITHIN_S):
        while not (hit := load.under_way):
            await asyncio.sleep(0.002)
    at = time.monotonic()
    injury = FAULTS[fault](scene)
    done = Repetition(fault, injury.what, at)
    try:
        await healed(scene.observer, injury, done)
    finally:
        for pid in injury.wake:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(HEALED_WITHIN_S):
        while any(answer in load.running.values() for answer in hit):
            await asyncio.sleep(0.01)
    done.gaps_s = [longest_gap(answer, at) for answer in hit]
    return done


async def healed(observer: Observer, injury: Injury, done: Repetition) -> None:
    """Wait until the cluster is whole; set `done.noticed_s` and `done.reformed_s`."""
    if injury.replica:
        key = injury.replica, injury.epoch
        await observer.until(lambda: key in observer.failed, HEALED_WITHIN_S)
        done.noticed_s = observer.failed[key][0] - done.at
        if injury.wake:
            await asyncio.sleep(max(0.0, done.at + injury.wake_after_s - time.monotonic()))
            for pid in injury.wake:
                os.kill(pid, signal.SIGCONT)
            injury.wake.clear()
        await observer.until(
            lambda: any(name == injury.replica and epoch > injury.epoch for name, epoch in observer.ready),
            HEALED_WITHIN_S,
        )
        done.reformed_s = min(
            when - done.at
            for (name, epoch), when in observer.ready.items()
            if name == injury.replica and epoch > injury.epoch
        )
    elif injury.wake:
        await asyncio.sleep(injury.wake_after_s)
        for pid in injury.wake:
            os.kill(pid, signal.SIGCONT)
        injury.wake.clear()
    await observer.until(lambda: all(map(observer.is_ready, observer.snapshot.replicas)), HEALED_WITHIN_S)


async def routed(cluster: Cluster, replicas: int) -> None:
    """Wait until every gateway, also one that was restarted, reaches every replica."""
    for gateway in cluster.info()["gateways"]:
        async with asyncio.timeout(HEALED_WITHIN_S):
            while await asyncio.to_thread(_reached, gateway["http"]) != replicas:
                await asyncio.sleep(0.1)


def _reached(gateway: str) -> int:
    try:
        with urllib.request.urlopen(f"{gateway}/v1/models", timeout=2.0) as response:
            return sum(model["ready_replicas"] for model in json.load(response)["data"])
    except OSError:
        return 0


async def soak(scene: Scene, load: Load, every_s: float, faults: list[str]) -> list[Repetition]:
    """Inject a random fault every `every_s` seconds, healed or not, until the load has ended."""
    done: list[Repetition] = []
    waking: set[asyncio.Task[None]] = set()

    async def wake(injury: Injury) -> None:
        await asyncio.sleep(injury.wake_after_s)
        for pid in injury.wake:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    while len(load.answers) + load.streams < load.total:
        await asyncio.sleep(every_s)
        fault, at = scene.chance.choice(faults), time.monotonic()
        try:
            injury = FAULTS[fault](scene)
        except (IndexError, KeyError, FileNotFoundError, ProcessLookupError, StopIteration):
            continue  # the fault's victim has not come back yet
        done.append(Repetition(fault, injury.what, at))
        if injury.wake:
            task = asyncio.create_task(wake(injury))
            waking.add(task)
            task.add_done_callback(waking.discard)
        if len(done) % 20 == 0:
            print(f"  {len(load.answers)} answers, {len(done)} faults", flush=True)
    await asyncio.gather(*waking)
    return done


class Memory:
    """Resident memory of the cluster's processes over time; each boot of a process has its own series."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.samples: dict[str, list[tuple[float, float]]] = {}  # name and pid: times and MB

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            for process in self._cluster.info()["processes"]:
                if process["role"] in ("gateway", "worker"):
                    with contextlib.suppress(OSError):
                        series = self.samples.setdefault(f"{process['name']} {process['pid']}", [])
                        series.append((time.monotonic(), _resident_mb(process["pid"])))
            await asyncio.sleep(2.0)

    def growth(self, after_s: float = 20.0, min_s: float = 60.0) -> dict[str, dict[str, float]]:
        """For each boot that lived at least `min_s`: its memory in MB after `after_s`, and at its end."""
        table = {}
        for name, series in self.samples.items():
            warm = [mb for at, mb in series if at >= series[0][0] + after_s]
            if len(warm) > 1 and series[-1][0] - series[0][0] >= min_s:
                table[name] = {
                    "seconds": series[-1][0] - series[0][0],
                    "warm_mb": warm[0],
                    "end_mb": warm[-1],
                }
        return table


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def suffer(cluster: Cluster, options: argparse.Namespace) -> tuple[list[Repetition], Verdict, Load]:
    """Run all repetitions, or the soak, on one cluster."""
    gateways = [gateway["grpc"] for gateway in cluster.info()["gateways"]]
    references = await undisturbed(gateways, cluster.model, options.max_tokens)
    store = EtcdStore(cluster.info()["etcd"])
    observer = Observer(store)
    watching = asyncio.create_task(observer.run())
    await observer.until(lambda: len(observer.snapshot.replicas) == options.replicas, 10.0)
    scene = Scene(cluster, observer, random.Random(options.seed), options.etcd_stop_s)
    load = Load(gateways, cluster.model, options.streams, options.max_tokens, total=options.soak)
    done: list[Repetition] = []
    memory = Memory(cluster)
    sampling = asyncio.create_task(memory.run())
    schedule = [fault for fault in options.faults for _ in range(options.repetitions)]
    if options.shuffle:
        scene.chance.shuffle(schedule)
    try:
        async with load.run():
            if options.soak:
                done = await soak(scene, load, options.every, options.faults)
            for fault in [] if options.soak else schedule:
                try:
                    done.append(await repeat(scene, load, fault))
                    await routed(cluster, options.replicas)
                except TimeoutError:
                    load.problems.append(f"after {fault} number {len(done)} the cluster did not heal in time")
                    break
                print(_line(done[-1]), flush=True)
    finally:
        sampling.cancel()
        for name, row in memory.growth().items():
            print(f"  {name}: {row['warm_mb']:.0f} MB, after {row['seconds']:.0f} s {row['end_mb']:.0f} MB")
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await store.close()
    verdict = check(load.answers, references)
    verdict.lost += load.problems
    return done, verdict, load


def _line(one: Repetition) -> str:
    def ms(value: float | None) -> str:
        return "" if value is None else f"{value * 1000:.0f} ms"

    gap = max(one.gaps_s, default=0.0)
    return (
        f"  {one.what}: noticed {ms(one.noticed_s)}, longest gap {ms(gap)}, served again {ms(one.reformed_s)}"
    )


def summary(done: list[Repetition]) -> dict[str, dict[str, float]]:
    """Per fault: median, 99th percentile and maximum, in milliseconds. Gaps are those of all clients hit."""
    table = {}
    for fault in dict.fromkeys(one.fault for one in done):
        mine = [one for one in done if one.fault == fault]
        row: dict[str, float] = {"repetitions": len(mine)}
        series = {
            "noticed": [one.noticed_s for one in mine if one.noticed_s is not None],
            "gap": [gap for one in mine for gap in one.gaps_s],
            "served_again": [one.reformed_s for one in mine if one.reformed_s is not None],
        }
        for name, values in series.items():
            if values:
                row[f"{name}_median_ms"] = round(statistics.median(values) * 1000, 1)
                row[f"{name}_p99_ms"] = round(percentile(values, 0.99) * 1000, 1)
                row[f"{name}_max_ms"] = round(max(values) * 1000, 1)
        table[fault] = row
    return table


def _save(folder: Path | None, name: str, text: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(".phalanx/demo-model"))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--repetitions", type=int, default=3, help="of each fault")
    parser.add_argument("--shuffle", action="store_true", help="shuffle the faults, by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument(
        "--soak", type=int, default=0, help="run so many requests, with a fault every --every seconds"
    )
    parser.add_argument("--etcd-stop-s", type=float, default=10.0, help="how long etcd-stop lasts")
    parser.add_argument("--every", type=float, default=3.0)
    parser.add_argument("--report", type=Path, help="folder for report.json, timeline.svg and logs.txt")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="phalanx-chaos-") as folder,
        Cluster.start(
            options.model.resolve(),
            Path(folder),
            replicas=options.replicas,
            tp=options.tp,
            pp=options.pp,
            arguments=("--gateways", str(options.gateways)),
        ) as cluster,
    ):
        try:
            done, verdict, load = asyncio.run(suffer(cluster, options))
        finally:
            _save(options.report, "logs.txt", cluster.logs(LOG_CHARS))
    forget_limits()
    table = summary(done)
    for fault, row in table.items():
        print(fault, json.dumps(row))
    print(f"{verdict.whole} answers whole, {len(verdict.lost)} lost, {len(verdict.wrong)} wrong")
    for problem in (verdict.lost + verdict.wrong)[:20]:
        print(f"  {problem}")
    if options.report:
        report = {"summary": table, "verdict": asdict(verdict), "repetitions": [asdict(one) for one in done]}
        _save(options.report, "report.json", json.dumps(report, indent=1) + "\n")
        timeline.draw(done, load.answers, options.report / "timeline.svg")
    sys.exit(0 if verdict.ok else 1)


if __name__ == "__main__":
    main()
