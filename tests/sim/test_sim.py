"""A short version of `python -m tests.sim`: some seeds without a violation, and every planted bug found.

Here each bug gets faults that provoke it. `python -m tests.sim --bugs` finds the bugs with random faults.
"""

from __future__ import annotations

import pytest

from tests.sim.bugs import BUGS
from tests.sim.run import Fault, run

SEEDS = 100
FOUND_WITHIN = 40


@pytest.mark.timeout(300)
def test_nothing_goes_wrong() -> None:
    for seed in range(SEEDS):
        outcome = run(seed)
        assert not outcome.violations, f"run({seed}, faults={outcome.faults})"


def provoking(bug: str, seed: int) -> list[Fault]:
    match bug:
        case "epoch not checked":
            return [Fault(0.1, "cut gateway from store", seed << 4, 5.0), Fault(0.3, "crash engine", seed)]
        case "resumed at the wrong index" | "finish dropped":
            return [Fault(0.4, "crash gateway", seed << 4, 1.0)]
        case "hung engine looks healthy":
            return [Fault(0.4, "stop engine", seed)]
    return [Fault(0.4, "crash engine", seed)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    with BUGS[bug]():
        assert any(run(seed, provoking(bug, seed)).violations for seed in range(FOUND_WITHIN))
    assert not any(run(seed, provoking(bug, seed)).violations for seed in range(3)), "it was not the bug"


@pytest.mark.timeout(120)
def test_an_engine_comes_back_without_a_store_and_without_a_controller() -> None:
    outcome = run(3, [
        Fault(0.05, "crash controller", seconds=60.0),
        Fault(0.1, "store away", seconds=25.0),
        Fault(0.4, "crash engine", 21),
    ])  # fmt: skip
    assert not outcome.violations
    assert outcome.failovers


def test_a_seed_is_a_run() -> None:
    one, other = run(7), run(7)
    assert (one.faults, one.events, one.simulated_s) == (other.faults, other.events, other.simulated_s)
