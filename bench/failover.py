"""the gap that a client sees when the engine that serves its stream is killed, over many kills

Example: python -m bench.failover --model .phalanx/demo-model --kills 10
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from phalanx.cli.demo import gaps_of, killed_run, two_replicas, undisturbed_run
from phalanx.cli.get import fetch

BACK_WITHIN_S = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".phalanx/demo-model"))
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    gaps: list[float] = []
    with tempfile.TemporaryDirectory() as folder, two_replicas(options.model, Path(folder)) as running:
        expected = undisturbed_run(running.http, options.model.name)
        for _ in range(options.kills):
            killed = killed_run(running.http, options.model.name, Path(folder))
            assert killed.completion.token_ids == expected.token_ids
            gaps.append(killed.gap_s * 1000)
            wait_for_both(running.controller)
    gaps.sort()
    print(f"\n{len(gaps)} kills, every token equal")
    print(f"failover gap: median {statistics.median(gaps):.0f} ms, longest {gaps[-1]:.0f} ms")
    print(f"undisturbed: {statistics.mean(gaps_of(expected)) * 1000:.1f} ms between events")


def wait_for_both(controller: str) -> None:
    end = time.monotonic() + BACK_WITHIN_S
    while any(replica["state"] != "ready" for replica in fetch("replicas", controller)):
        assert time.monotonic() < end, "the killed replica has not come back"
        time.sleep(0.2)


if __name__ == "__main__":
    main()
