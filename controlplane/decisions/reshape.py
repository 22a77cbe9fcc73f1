"""Decides when a replica changes its shape: to the deployment's new one, or from degraded to larger. Pure.

- A replica of an outdated shape that does not serve is reshaped at once. A serving one is reshaped only while
  every replica of the new shape is ready, so each deployment reshapes one at a time.
- A degraded replica that has served for `GROW_AFTER_S` is formed in a larger layout as soon as one can be
  placed, unless another replica is about to be degraded onto the same workers.
"""

from __future__ import annotations

from controlplane.decisions.cycle import Cycle, Need
from controlplane.decisions.degrade import is_short, waited_long_enough
from controlplane.decisions.form import form_smaller, form_whole
from controlplane.decisions.health import ReplicaState, was_ready
from controlplane.decisions.shapes import is_degraded, smaller_shapes
from phalanx.store.records import WorkerRecord

GROW_AFTER_S = 10.0  # hysteresis: a worker that comes and goes must not restart the replica each time


def reshape(cycle: Cycle) -> bool:
    """Form each replica that may change its shape now; whether any was formed."""
    outdated = [replica for replica, need in cycle.needs.items() if need is Need.RESHAPE]
    serving = {replica for replica in outdated if cycle.health[replica].state is ReplicaState.READY}
    progress = False
    for replica in sorted(outdated, key=serving.__contains__):
        is_next = replica not in serving or not _is_rolling(cycle, cycle.desired[replica].name)
        if replica not in cycle.formed and is_next:
            own = {worker: cycle.snapshot.workers[worker] for worker in cycle.members(replica)}
            progress |= _reshape_one(cycle, replica, cycle.free | own, replica in serving)
    return progress


def _reshape_one(cycle: Cycle, replica: str, candidates: dict[str, WorkerRecord], serving: bool) -> bool:
    """Form a replica in its desired shape, or else a degraded one in a larger layout than it has."""
    runs = cycle.snapshot.replicas[replica].assignment.deployment
    degraded = is_degraded(runs, cycle.desired[replica])
    if degraded and serving and not _may_grow(cycle, replica):
        cycle.shortages[replica] = "stays as it is for the moment"
        return False
    if form_whole(cycle, replica, candidates):
        return True
    if not degraded:
        return False
    larger = [shape for shape in smaller_shapes(cycle.desired[replica]) if shape.shards > runs.shards]
    return form_smaller(cycle, replica, larger, candidates)


def _may_grow(cycle: Cycle, replica: str) -> bool:
    """Whether a degraded replica has served long enough, and no other replica waits for these workers."""
    if any(is_short(cycle, other) and not waited_long_enough(cycle, other) for other in cycle.shortages):
        return False
    if not was_ready(cycle.snapshot, replica):
        return False
    ready_at = cycle.snapshot.ready[replica].ready_at
    if ready_at <= cycle.now < ready_at + GROW_AFTER_S:
        cycle.wakes.append(ready_at + GROW_AFTER_S)
        return False
    return True


def _is_rolling(cycle: Cycle, deployment: str) -> bool:
    """Whether a replica of the new shape is not ready yet."""
    return any(
        replica in cycle.formed
        or (_is_current(cycle, replica) and cycle.health[replica].state is not ReplicaState.READY)
        for replica in cycle.needs
        if cycle.desired[replica].name == deployment
    )


def _is_current(cycle: Cycle, replica: str) -> bool:
    """Whether the replica runs the desired revision, whole or degraded, and is not about to be formed."""
    if cycle.needs[replica] is Need.RESHAPE:
        runs = cycle.snapshot.replicas[replica].assignment.deployment
        return is_degraded(runs, cycle.desired[replica])
    return cycle.needs[replica] is not Need.FORM
