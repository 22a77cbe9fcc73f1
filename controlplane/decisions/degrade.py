"""Decides that a replica is degraded: formed in a smaller layout than its deployment asks for. Pure.

A replica that has served and has lacked workers for `DEGRADE_AFTER_S` is formed in the best of its
deployment's smaller layouts that can be placed and fits into memory. Whole replicas are formed first
(`form`). `reshape` decides when a degraded replica grows again.
"""

from __future__ import annotations

import math

from controlplane.decisions.cycle import Cycle, Need
from controlplane.decisions.form import form_smaller
from controlplane.decisions.shapes import is_degraded, smaller_shapes

DEGRADE_AFTER_S = 5.0  # a worker whose process restarts has registered again by then


def degrade(cycle: Cycle) -> bool:
    """Degrade the first replica that can be; whether one was.

    A replica that already ran degraded may at once get a layout that is at least as large as that one.
    """
    for replica in cycle.shortages:
        if not can_degrade(cycle, replica) or replica in cycle.retries:
            continue
        shapes = smaller_shapes(cycle.desired[replica])
        if not is_due(cycle, replica):
            current = cycle.snapshot.replicas.get(replica)
            runs = current.assignment.deployment if current else None
            before = runs.shards if runs and is_degraded(runs, cycle.desired[replica]) else math.inf
            shapes = [shape for shape in shapes if shape.shards >= before]
        if form_smaller(cycle, replica, shapes, cycle.free):
            return True
    return False


def can_degrade(cycle: Cycle, replica: str) -> bool:
    """Whether the replica has served and now lacks workers."""
    return (
        cycle.needs[replica] is Need.FORM and replica not in cycle.formed and replica in cycle.snapshot.ready
    )


def is_due(cycle: Cycle, replica: str) -> bool:
    """Whether the replica has lacked workers for `DEGRADE_AFTER_S`."""
    return _short_since(cycle, replica) + DEGRADE_AFTER_S <= cycle.now


def degradable_since(cycle: Cycle) -> dict[str, float]:
    """Since when each replica that can be degraded has lacked workers."""
    return {
        replica: _short_since(cycle, replica) for replica in cycle.shortages if can_degrade(cycle, replica)
    }


def waiting_since(cycle: Cycle) -> dict[str, float]:
    """The same of replicas that wait for a retry: the wait does not restart `DEGRADE_AFTER_S`."""
    waiting = [replica for replica, need in cycle.needs.items() if need is Need.WAIT]
    return {
        replica: _short_since(cycle, replica) for replica in waiting if replica in cycle.history.short_since
    }


def _short_since(cycle: Cycle, replica: str) -> float:
    return min(cycle.history.short_since.get(replica, cycle.now), cycle.now)
