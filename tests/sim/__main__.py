"""Simulates many seeds on all cores, and prints how many of them found a violation.

Example: python -m tests.sim --seeds 20000
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence

from tests.sim.bugs import BUGS
from tests.sim.run import Outcome, run


def fixed_hashes(module: str, arguments: Sequence[str]) -> None:
    """Restart this program with fixed hashes: the shells iterate over sets, so hashes change the order."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(
            sys.executable,
            [sys.executable, "-m", module, *arguments],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )


def find(bug: str, max_seeds: int) -> int | None:
    """How many seeds it takes to find a planted bug; None if `max_seeds` seeds do not find it."""
    with BUGS[bug]():
        return next((seed + 1 for seed in range(max_seeds) if run(seed).violations), None)


def report(outcome: Outcome) -> None:
    """Print a run with violations, and the call that repeats it."""
    print(f"seed {outcome.seed}: {outcome.violations[:5]}")
    print(f"  run({outcome.seed}, faults={outcome.faults})")
    for event in outcome.events:
        print(f"    {event}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--bugs", action="store_true", help="look for each planted bug first")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if options.bugs:
        for bug in BUGS:
            print(f"{bug}: found by seed {find(bug, 2000)}", flush=True)
    began, bad = time.monotonic(), 0
    totals: Counter[str] = Counter()
    with multiprocessing.Pool(options.processes, maxtasksperchild=500) as pool:
        seeds = range(options.first, options.first + options.seeds)
        for number, outcome in enumerate(pool.imap_unordered(run, seeds, chunksize=10), 1):
            for name in ("finished", "failed", "failovers", "resumed", "stale"):
                totals[name] += getattr(outcome, name)
            totals["faults"] += len(outcome.faults)
            if outcome.violations:
                bad += 1
                report(outcome)
            if number % 1000 == 0:
                print(f"{number} seeds, {number / (time.monotonic() - began):.1f} per second", flush=True)
    took = time.monotonic() - began
    rate = options.seeds / took
    print(f"{options.seeds} seeds in {took:.0f} s, {rate:.1f} per second: {bad} with violations")
    print(", ".join(f"{count} {name}" for name, count in totals.items()))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    fixed_hashes("tests.sim", sys.argv[1:])
    main()
