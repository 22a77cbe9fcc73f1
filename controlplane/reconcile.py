"""From the cluster as it is to what must be written to get closer to what is wanted. Pure.

Owns: when replicas are formed, formed again, rolled to a new shape and removed.
Does not own: which workers (`placement`), writing (`actions`, `main`), what a replica's state means
(`replicas`).

The rules:
- A replica that is missing is formed as soon as there are workers for it.
- A failed replica (`replicas.health`) is formed again. After it had served, and the first time, at
  once; each further epoch that fails before it is ready waits longer, counted from when that epoch was
  formed. A permanent failure waits the longest.
- A failed replica without enough workers is left as it is: its workers may come back. What is left of
  it serves other replicas when they need it, and then it is removed.
- One that had served and still lacks workers after `DEGRADE_AFTER_S` is formed in the largest of its
  deployment's smaller layouts that can be placed and fits into memory: it is degraded. Once it has served
  for `RETURN_AFTER_S`, it is formed again in a larger one as soon as that can be placed, unless another
  replica is about to be degraded with the same workers.
- When most workers of the replicas have gone at once (`losses`), the store's leases are suspected rather than
  the workers: their replicas have `SUSPECT_S` to come back before anybody else gets their places.
- A replica of an outdated shape is formed again at once when it is not serving, else one at a time,
  and only when it can be placed and every replica of the new shape is ready.
- An assignment that cannot be read is written anew, or removed when nobody wants it. The replicas of a
  deployment that cannot be read stay as they are.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from controlplane.losses import missing, suspects
from controlplane.placement import Shortage, place
from controlplane.planner import fits
from controlplane.replicas import (
    Health,
    ReplicaState,
    fallbacks,
    health,
    is_degraded,
    on_hold,
    same_shape,
    split_name,
    unreadable,
    wanted,
    was_ready,
)
from phalanx.store.records import AssignmentRecord, DeploymentRecord, MemberRecord, ReadyRecord, WorkerRecord
from phalanx.store.snapshot import Snapshot

BACK_OFF_FIRST_S = 1.0
BACK_OFF_CAP_S = 30.0
DEGRADE_AFTER_S = 5.0  # a worker whose process was started again has registered by then
RETURN_AFTER_S = 10.0  # a worker that comes and goes must not have the replica formed each time
SUSPECT_S = 3.0  # a worker that lives registers again within a second of the store's return


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision tells the next: since when, in seconds since the Unix epoch.

    `short`: replicas that could be degraded have lacked workers. `suspect`: replicas that went with most
    others have lacked registrations. `missing`: workers have not been registered.
    """

    short: Mapping[str, float] = field(default_factory=dict)
    suspect: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, float] = field(default_factory=dict)


_NOTHING = Memory()


@dataclass(frozen=True, slots=True)
class Form:
    """Write an assignment over the one of `epoch` (0: none): the replica's next epoch begins."""

    assignment: AssignmentRecord
    epoch: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Delete the assignment of `epoch`."""

    replica: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Delete the note that a replica, which is not wanted any more, has been ready."""

    replica: str


@dataclass(frozen=True, slots=True)
class MarkReady:
    """Note that an epoch has been ready."""

    ready: ReadyRecord


@dataclass(frozen=True, slots=True)
class Prune:
    """Delete the status of a shard that no replica has any more."""

    replica: str
    rank: int


Action = Form | Remove | Forget | MarkReady | Prune


@dataclass(frozen=True, slots=True)
class Decision:
    """What to write, and what is left undone and why.

    `shortages`: the reason, by replica that is not as it is wanted. `retries`: when, in seconds since the
    Unix epoch, by failed replica that is not to be formed yet. `memory`: for the next decision. `wake_at`:
    when to look again although nothing has changed.
    """

    actions: tuple[Action, ...]
    shortages: Mapping[str, str]
    retries: Mapping[str, float]
    memory: Memory
    wake_at: float | None


def reconcile(snapshot: Snapshot, now: float, memory: Memory = _NOTHING) -> Decision:
    """Decide, at `now` in seconds since the Unix epoch; `memory` as the decision before left it.

    The snapshot that results from the actions needs no further action at the same time.
    """
    return _Round(snapshot, now, memory).decide()


def retry_at(assignment: AssignmentRecord, permanent: bool, now: float) -> float:
    """When an epoch that failed before it was ready may be followed by the next."""
    if assignment.formed_at > now:
        return now  # a clock was set back: do not wait for it
    if permanent:
        return assignment.formed_at + BACK_OFF_CAP_S
    if assignment.failures == 0:
        return now
    delay = BACK_OFF_FIRST_S * 2.0 ** min(assignment.failures - 1, 10)
    return assignment.formed_at + min(BACK_OFF_CAP_S, delay)


class _Need(enum.Enum):
    KEEP = enum.auto()
    WAIT = enum.auto()  # failed, and not to be formed yet
    FORM = enum.auto()  # missing or failed
    RESHAPE = enum.auto()  # of an outdated shape or degraded, and may be serving


@dataclass(slots=True)
class _Round:
    """One decision in the making.

    Owns: the workers not yet spoken for and the assignments written so far.
    """

    snapshot: Snapshot
    now: float
    memory: Memory
    wanted: dict[str, DeploymentRecord] = field(init=False)
    health: dict[str, Health] = field(init=False)
    missing: dict[str, float] = field(init=False)
    suspects: dict[str, float] = field(init=False)
    needs: dict[str, _Need] = field(init=False)
    epochs: dict[str, int] = field(init=False)
    held: list[str] = field(init=False)
    free: dict[str, WorkerRecord] = field(init=False)
    formed: dict[str, Form] = field(default_factory=dict)
    shortages: dict[str, str] = field(default_factory=dict)
    retries: dict[str, float] = field(default_factory=dict)
    wakes: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wanted = wanted(self.snapshot)
        self.health = {name: health(self.snapshot, name) for name in self.snapshot.replicas}
        self.missing = missing(self.snapshot, self.memory.missing, self.now)
        self.suspects = suspects(self.snapshot, self.missing, self.memory.suspect, self.now)
        self.needs = {name: self._need(name) for name in self.wanted}
        self.epochs = {name: assigned.epoch for name, assigned in self.snapshot.replicas.items()}
        self.epochs |= unreadable(self.snapshot)
        self.held = on_hold(self.snapshot)
        kept = [name for name, need in self.needs.items() if need is not _Need.FORM]
        reserved = {member for name in kept + self.held for member in self._members(name)}
        self.free = {name: worker for name, worker in self.snapshot.workers.items() if name not in reserved}

    def decide(self) -> Decision:
        # Shrinking one replica can free the workers that another lacks.
        while self._form_missing() or self._degrade() or self._reshape():
            pass
        short = {name: self._short_since(name) for name in self.shortages if self._can_degrade(name)}
        due = [since + DEGRADE_AFTER_S for since in short.values()]
        wakes = [at for at in (*self.retries.values(), *self.wakes, *due) if at > self.now]
        waiting = [name for name, need in self.needs.items() if need is _Need.WAIT]
        short |= {name: self._short_since(name) for name in waiting if name in self.memory.short}
        removed = self._removed()
        actions: tuple[Action, ...] = (
            *(Remove(name, self.epochs[name]) for name in removed),
            *self.formed.values(),
            *self._marks(),
            *self._prunes(removed),
            *(Forget(name) for name in sorted(self.snapshot.ready) if self._is_past(name, removed)),
        )
        memory = Memory(short, self.suspects, self.missing)
        return Decision(actions, self.shortages, self.retries, memory, min(wakes, default=None))

    def _need(self, name: str) -> _Need:
        assigned = self.snapshot.replicas.get(name)
        if assigned is None:
            return _Need.FORM
        failed = self.health[name].state is ReplicaState.FAILED
        runs, wanted = assigned.assignment.deployment, self.wanted[name]
        whole, degraded = same_shape(runs, wanted), is_degraded(runs, wanted)
        if not failed:
            return _Need.KEEP if whole else _Need.RESHAPE
        if name in self.suspects and self.now < self.suspects[name] + SUSPECT_S:
            self.retries[name] = self.suspects[name] + SUSPECT_S
            return _Need.WAIT
        if not whole and not degraded:
            return _Need.FORM
        if not was_ready(self.snapshot, name):
            due = retry_at(assigned.assignment, self.health[name].permanent, self.now)
            if due > self.now:
                self.retries[name] = due
                # It is the smaller layout that has failed: the one that is wanted may be tried.
                return _Need.FORM if degraded else _Need.WAIT
        return _Need.FORM

    def _form_missing(self) -> bool:
        progress = False
        for name, need in self.needs.items():
            if need is _Need.FORM and name not in self.formed:
                progress |= self._form(name, self.free)
        return progress

    def _degrade(self) -> bool:
        """Form in a smaller layout what has lacked workers for long, one at a time.

        One that had a smaller layout before may have it again at once.
        """
        for name in self.shortages:
            if not self._can_degrade(name) or name in self.retries:
                continue
            layouts = fallbacks(self.wanted[name])
            if not self._is_due(name):
                assigned = self.snapshot.replicas.get(name)
                runs = assigned.assignment.deployment if assigned else None
                had = runs.shards if runs and is_degraded(runs, self.wanted[name]) else math.inf
                layouts = [layout for layout in layouts if layout.shards >= had]
            if self._form_smaller(name, layouts, self.free):
                return True
        return False

    def _can_degrade(self, name: str) -> bool:
        """Whether it had served, and now lacks workers."""
        return self.needs[name] is _Need.FORM and name not in self.formed and name in self.snapshot.ready

    def _is_due(self, name: str) -> bool:
        """Whether it has lacked workers for so long that it may be degraded."""
        return self._short_since(name) + DEGRADE_AFTER_S <= self.now

    def _short_since(self, name: str) -> float:
        return min(self.memory.short.get(name, self.now), self.now)

    def _reshape(self) -> bool:
        """Form again what is outdated or degraded and idle, and of each deployment one that serves."""
        outdated = [name for name, need in self.needs.items() if need is _Need.RESHAPE]
        serving = {name for name in outdated if self.health[name].state is ReplicaState.READY}
        progress = False
        for name in sorted(outdated, key=serving.__contains__):
            if name not in self.formed and not (name in serving and self._is_rolling(self.wanted[name].name)):
                own = {member: self.snapshot.workers[member] for member in self._members(name)}
                progress |= self._grow(name, self.free | own, name in serving)
        return progress

    def _grow(self, name: str, candidates: dict[str, WorkerRecord], serving: bool) -> bool:
        """Give a replica the shape that is wanted; a degraded one, if need be, a larger one than it has."""
        assigned = self.snapshot.replicas[name]
        runs = assigned.assignment.deployment
        degraded = is_degraded(runs, self.wanted[name])
        if degraded and serving and not self._may_grow(name):
            self.shortages[name] = "stays as it is for the moment"
            return False
        if self._form(name, candidates):
            return True
        larger = [one for one in fallbacks(self.wanted[name]) if one.shards > runs.shards] if degraded else []
        return self._form_smaller(name, larger, candidates)

    def _may_grow(self, name: str) -> bool:
        """Whether a degraded replica has served for long enough, and takes nobody's last chance."""
        if any(self._can_degrade(one) and not self._is_due(one) for one in self.shortages):
            return False
        if not was_ready(self.snapshot, name):
            return False
        ready_at = self.snapshot.ready[name].ready_at
        if ready_at <= self.now < ready_at + RETURN_AFTER_S:
            self.wakes.append(ready_at + RETURN_AFTER_S)
            return False
        return True

    def _is_rolling(self, deployment: str) -> bool:
        """Whether some replica of the new shape is not ready yet."""
        return any(
            name in self.formed
            or (self._is_current(name) and self.health[name].state is not ReplicaState.READY)
            for name in self.needs
            if self.wanted[name].name == deployment
        )

    def _is_current(self, name: str) -> bool:
        """Whether it runs what is wanted, if in a smaller layout, and is not about to be formed."""
        if self.needs[name] is _Need.RESHAPE:
            return is_degraded(self.snapshot.replicas[name].assignment.deployment, self.wanted[name])
        return self.needs[name] is not _Need.FORM

    def _form(self, name: str, candidates: dict[str, WorkerRecord]) -> bool:
        """Place a replica as it is wanted if `candidates` are enough; those left over stay free."""
        members = place(self.wanted[name], candidates, self._members(name))
        if isinstance(members, Shortage):
            self.shortages[name] = members.reason
            return False
        self._assign(name, self.wanted[name], members, candidates)
        return True

    def _form_smaller(
        self, name: str, layouts: Sequence[DeploymentRecord], candidates: dict[str, WorkerRecord]
    ) -> bool:
        """Place a replica in the first of these layouts that `candidates` are enough for."""
        weights = {(layout.tp, layout.pp): layout for layout in self.wanted[name].fallbacks}
        for layout in layouts:
            members = place(layout, candidates, self._members(name))
            if isinstance(members, Shortage):
                continue
            workers = [candidates[member.worker] for member in members]
            if fits(layout, weights[layout.tp, layout.pp], workers):
                self._assign(name, layout, members, candidates)
                return True
        return False

    def _assign(
        self,
        name: str,
        deployment: DeploymentRecord,
        members: tuple[MemberRecord, ...],
        candidates: dict[str, WorkerRecord],
    ) -> None:
        self.shortages.pop(name, None)
        taken = {member.worker for member in members}
        self.free = {worker: record for worker, record in candidates.items() if worker not in taken}
        failures = self._failures(name, deployment)
        assignment = AssignmentRecord(name, deployment, members, failures, self.now)
        self.formed[name] = Form(assignment, self.epochs.get(name, 0))

    def _failures(self, name: str, deployment: DeploymentRecord) -> int:
        """Consecutive epochs of this shape that failed before they were ready."""
        assigned = self.snapshot.replicas.get(name)
        if assigned is None or was_ready(self.snapshot, name):
            return 0
        same = same_shape(assigned.assignment.deployment, deployment)
        return assigned.assignment.failures + 1 if same else 0

    def _removed(self) -> list[str]:
        """Replicas that nobody wants, the highest index first, and those whose workers were taken."""
        unwanted = [name for name in self.epochs if name not in self.wanted and name not in self.held]
        unwanted.sort(key=lambda name: (split_name(name)[0], -split_name(name)[1]))
        taken = {member.worker for form in self.formed.values() for member in form.assignment.members}
        displaced = [
            name
            for name in self.shortages
            if name in self.snapshot.replicas
            and self.needs[name] is _Need.FORM
            and taken.intersection(self._members(name))
        ]
        return unwanted + displaced

    def _marks(self) -> list[MarkReady]:
        return [
            MarkReady(ReadyRecord(name, self.snapshot.replicas[name].epoch, self.now))
            for name in self.wanted
            if name in self.snapshot.replicas
            and name not in self.formed
            and self.health[name].state is ReplicaState.READY
            and not was_ready(self.snapshot, name)
        ]

    def _prunes(self, removed: list[str]) -> list[Prune]:
        ranks = {name: len(self._members(name)) for name in self.snapshot.replicas if name not in removed}
        ranks |= {name: len(form.assignment.members) for name, form in self.formed.items()}
        return [
            Prune(replica, rank)
            for replica, rank in sorted(self.snapshot.shards)
            if rank >= ranks.get(replica, 0)
        ]

    def _is_past(self, name: str, removed: list[str]) -> bool:
        """Whether nobody wants the replica, and no assignment of it is left."""
        return (
            name not in self.wanted and name not in self.held and (name not in self.epochs or name in removed)
        )

    def _members(self, name: str) -> list[str]:
        assigned = self.snapshot.replicas.get(name)
        return [member.worker for member in assigned.assignment.members] if assigned else []
