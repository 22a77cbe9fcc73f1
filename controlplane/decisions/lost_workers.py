"""Which assigned workers are missing, since when, and whether the store is the likely cause. Pure.

When many leases end together, the store was probably unreachable or has lost them: the workers may be
alive. Times are in seconds since the Unix epoch.
"""

from __future__ import annotations

from collections.abc import Mapping

from phalanx.store.records import AssignmentRecord
from phalanx.store.snapshot import Snapshot

TOGETHER_S = 1.5  # leases are renewed once per second, so leases that one outage ends end this close together
SUSPECT_S = 3.0  # a live worker registers again within a second after the store is back


def missing_since(snapshot: Snapshot, previous: Mapping[str, float], now: float) -> dict[str, float]:
    """Since when each assigned worker has been missing; `previous` is the last result."""
    return {
        worker: min(previous.get(worker, now), now)
        for worker in _assigned_workers(snapshot)
        if worker not in snapshot.workers
    }


def suspect_since(
    snapshot: Snapshot, missing_since: Mapping[str, float], previous: Mapping[str, float], now: float
) -> dict[str, float]:
    """Since when each replica is suspect: its workers vanished together with most others.

    The store is then the suspected cause. `previous` is the last result.
    """
    recent = {worker for worker, since in missing_since.items() if since + TOGETHER_S >= now}
    num_before = len(_assigned_workers(snapshot)) - len(missing_since) + len(recent)
    most_vanished = len(recent) > 1 and 2 * len(recent) > num_before
    suspect = {}
    for replica, current in snapshot.replicas.items():
        workers = _workers(current.assignment)
        still_suspect = replica in previous and not workers.isdisjoint(missing_since)
        if still_suspect or (most_vanished and not workers.isdisjoint(recent)):
            suspect[replica] = min(previous.get(replica, now), now)
    return suspect


def _assigned_workers(snapshot: Snapshot) -> set[str]:
    return {worker for current in snapshot.replicas.values() for worker in _workers(current.assignment)}


def _workers(assignment: AssignmentRecord) -> set[str]:
    return {member.worker for member in assignment.members}
