"""Decides what each desired replica needs, and when a failed one may be formed again. Pure.

- When an epoch fails after it was ready, the next one follows at once. The same holds for the first of
  several consecutive epochs that fail before they are ready.
- After each further one the wait grows. It counts from when the failed epoch was formed. After a permanent
  failure it is `BACK_OFF_CAP_S` from the start.
- When many leases ended together, the store may have lost them (`lost_workers`). Then the workers have
  `SUSPECT_S` to register again before other workers take their ranks.
"""

from __future__ import annotations

from controlplane.decisions.cycle import Cycle, Need
from controlplane.decisions.health import ReplicaState, was_ready
from controlplane.decisions.lost_workers import SUSPECT_S
from controlplane.decisions.shapes import is_degraded, same_shape
from phalanx.store.records import AssignmentRecord

BACK_OFF_FIRST_S = 1.0
BACK_OFF_CAP_S = 30.0


def assess(cycle: Cycle) -> None:
    """Fill `needs`, `retries`, and `free` with the workers that no replica keeps."""
    cycle.needs = {replica: _need(cycle, replica) for replica in cycle.desired}
    staying = [replica for replica, need in cycle.needs.items() if need is not Need.FORM]
    reserved = {worker for replica in staying + cycle.frozen for worker in cycle.members(replica)}
    cycle.free = {
        worker: record for worker, record in cycle.snapshot.workers.items() if worker not in reserved
    }


def retry_at(assignment: AssignmentRecord, permanent: bool, now: float) -> float:
    """When the next epoch may follow an epoch that failed before it was ready."""
    if assignment.formed_at > now:
        return now  # the clock was set back: do not wait until it reaches `formed_at` again
    if permanent:
        return assignment.formed_at + BACK_OFF_CAP_S
    if assignment.failures == 0:
        return now
    delay = BACK_OFF_FIRST_S * 2.0 ** min(assignment.failures - 1, 10)
    return assignment.formed_at + min(BACK_OFF_CAP_S, delay)


def _need(cycle: Cycle, replica: str) -> Need:
    current = cycle.snapshot.replicas.get(replica)
    if current is None:
        return Need.FORM
    failed = cycle.health[replica].state is ReplicaState.FAILED
    runs, desired = current.assignment.deployment, cycle.desired[replica]
    as_desired, degraded = same_shape(runs, desired), is_degraded(runs, desired)
    if not failed:
        return Need.KEEP if as_desired else Need.RESHAPE
    if replica in cycle.suspect_since and cycle.now < cycle.suspect_since[replica] + SUSPECT_S:
        cycle.retries[replica] = cycle.suspect_since[replica] + SUSPECT_S
        return Need.WAIT
    if not as_desired and not degraded:
        return Need.FORM
    if not was_ready(cycle.snapshot, replica):
        due = retry_at(current.assignment, cycle.health[replica].permanent, cycle.now)
        if due > cycle.now:
            cycle.retries[replica] = due
            # The failure is that of the smaller layout. The desired layout may be tried at once.
            return Need.FORM if degraded else Need.WAIT
    return Need.FORM
