"""Which workers have gone, since when, and whether that is more likely the store's fault than theirs. Pure.

Leases that end together mean a store that was away, or that forgot them: the workers may well live.
Times are in seconds since the Unix epoch.
"""

from __future__ import annotations

from collections.abc import Mapping

from phalanx.store.records import AssignmentRecord
from phalanx.store.snapshot import Snapshot

AT_ONCE_S = 1.5  # leases are renewed every second, so that is how far apart they end


def missing(snapshot: Snapshot, before: Mapping[str, float], now: float) -> dict[str, float]:
    """Since when workers that replicas are formed of are not registered; `before` is the last answer."""
    return {
        member: min(before.get(member, now), now)
        for member in _members(snapshot)
        if member not in snapshot.workers
    }


def suspects(
    snapshot: Snapshot, missing: Mapping[str, float], before: Mapping[str, float], now: float
) -> dict[str, float]:
    """Since when replicas have lacked workers that went when most did; `before` is the last answer."""
    recent = {member for member, since in missing.items() if since + AT_ONCE_S >= now}
    there_before = len(_members(snapshot)) - len(missing) + len(recent)
    most_are_gone = len(recent) > 1 and 2 * len(recent) > there_before
    found = {}
    for name, assigned in snapshot.replicas.items():
        members = _workers(assigned.assignment)
        still = name in before and not members.isdisjoint(missing)
        if still or (most_are_gone and not members.isdisjoint(recent)):
            found[name] = min(before.get(name, now), now)
    return found


def _members(snapshot: Snapshot) -> set[str]:
    return {member for assigned in snapshot.replicas.values() for member in _workers(assigned.assignment)}


def _workers(assignment: AssignmentRecord) -> set[str]:
    return {member.worker for member in assignment.members}
