"""Forms replicas: assigns workers to a replica, which begins its next epoch. Pure.

A missing or failed replica is formed as soon as there are enough free workers. A failed replica without
enough workers keeps its assignment, because its workers may come back. Meanwhile other replicas may take its
remaining workers; then its assignment is removed (`cleanup`).
"""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.decisions.actions import FormReplica
from controlplane.decisions.cycle import Cycle, Need
from controlplane.decisions.health import was_ready
from controlplane.decisions.memory_fit import fits
from controlplane.decisions.placement import Shortage, place
from controlplane.decisions.shapes import same_shape
from phalanx.store.records import AssignmentRecord, DeploymentRecord, MemberRecord, WorkerRecord


def form_missing(cycle: Cycle) -> bool:
    """Form every missing or failed replica for which free workers suffice; whether any was formed."""
    progress = False
    for replica, need in cycle.needs.items():
        if need is Need.FORM and replica not in cycle.formed:
            progress |= form_whole(cycle, replica, cycle.free)
    return progress


def form_whole(cycle: Cycle, replica: str, candidates: dict[str, WorkerRecord]) -> bool:
    """Form a replica in its desired layout if there are enough `candidates`; the unused ones stay free."""
    members = place(cycle.desired[replica], candidates, cycle.members(replica))
    if isinstance(members, Shortage):
        cycle.shortages[replica] = members.reason
        return False
    _assign(cycle, replica, cycle.desired[replica], members, candidates)
    return True


def form_smaller(
    cycle: Cycle, replica: str, shapes: Sequence[DeploymentRecord], candidates: dict[str, WorkerRecord]
) -> bool:
    """Form a replica in the first of `shapes` that `candidates` can run: enough workers, enough memory."""
    layouts = {(layout.tp, layout.pp): layout for layout in cycle.desired[replica].fallbacks}
    for shape in shapes:
        members = place(shape, candidates, cycle.members(replica))
        if isinstance(members, Shortage):
            continue
        workers = [candidates[member.worker] for member in members]
        if fits(shape, layouts[shape.tp, shape.pp], workers):
            _assign(cycle, replica, shape, members, candidates)
            return True
    return False


def _assign(
    cycle: Cycle,
    replica: str,
    shape: DeploymentRecord,
    members: tuple[MemberRecord, ...],
    candidates: dict[str, WorkerRecord],
) -> None:
    cycle.shortages.pop(replica, None)
    taken = {member.worker for member in members}
    cycle.free = {worker: record for worker, record in candidates.items() if worker not in taken}
    assignment = AssignmentRecord(replica, shape, members, _failures(cycle, replica, shape), cycle.now)
    cycle.formed[replica] = FormReplica(assignment, cycle.epochs.get(replica, 0))


def _failures(cycle: Cycle, replica: str, shape: DeploymentRecord) -> int:
    """The number of consecutive epochs of this shape that failed before they were ready."""
    current = cycle.snapshot.replicas.get(replica)
    if current is None or was_ready(cycle.snapshot, replica):
        return 0
    same = same_shape(current.assignment.deployment, shape)
    return current.assignment.failures + 1 if same else 0
