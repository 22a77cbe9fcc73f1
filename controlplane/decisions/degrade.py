"""Decides that a replica is degraded: formed in a smaller layout than its deployment asks for. Pure.

A replica is *short* when it has served and now lacks workers. A replica that has been short for
`DEGRADE_AFTER_S` is formed in the best of its deployment's smaller layouts that can be placed and fits into
memory. Whole replicas are formed first (`form`). `reshape` decides when a degraded replica grows again.
"""

from __future__ import annotations

import math

from controlplane.decisions.cycle import Cycle, Need
from controlplane.decisions.form import form_smaller
from controlplane.decisions.shapes import is_degraded, smaller_shapes

DEGRADE_AFTER_S = 5.0  # a worker whose process restarts has registered again by then


def form_degraded(cycle: Cycle) -> bool:
    """Form the first short replica for which a smaller layout can be placed; whether one was formed.

    A replica that ran degraded before does not wait for `DEGRADE_AFTER_S`, if the new layout is at least as
    large as that one.
    """
    for replica in cycle.shortages:
        if not is_short(cycle, replica) or replica in cycle.retries:
            continue
        shapes = smaller_shapes(cycle.desired[replica])
        if not waited_long_enough(cycle, replica):
            current = cycle.snapshot.replicas.get(replica)
            runs = current.assignment.deployment if current else None
            before = runs.shards if runs and is_degraded(runs, cycle.desired[replica]) else math.inf
            shapes = [shape for shape in shapes if shape.shards >= before]
        if form_smaller(cycle, replica, shapes, cycle.free):
            return True
    return False


def is_short(cycle: Cycle, replica: str) -> bool:
    """Whether the replica has served, and this cycle has not found workers for it."""
    return (
        cycle.needs[replica] is Need.FORM and replica not in cycle.formed and replica in cycle.snapshot.ready
    )


def waited_long_enough(cycle: Cycle, replica: str) -> bool:
    """Whether the short replica has been short for `DEGRADE_AFTER_S`."""
    return _short_since(cycle, replica) + DEGRADE_AFTER_S <= cycle.now


def short_replicas(cycle: Cycle) -> dict[str, float]:
    """Since when each short replica has been short."""
    return {replica: _short_since(cycle, replica) for replica in cycle.shortages if is_short(cycle, replica)}


def short_before_retry(cycle: Cycle) -> dict[str, float]:
    """Since when each replica that now waits for a retry has been short: the wait must not reset it."""
    waiting = [replica for replica, need in cycle.needs.items() if need is Need.WAIT]
    return {
        replica: _short_since(cycle, replica) for replica in waiting if replica in cycle.history.short_since
    }


def _short_since(cycle: Cycle, replica: str) -> float:
    return min(cycle.history.short_since.get(replica, cycle.now), cycle.now)
