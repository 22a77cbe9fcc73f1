"""From a snapshot of the cluster to the actions that bring it closer to its desired state. Pure.

Owns: the order of the decisions. Does not own: the rules of each decision (the file that it is
imported from), the writing (`controlplane.fencing`, `controlplane.active_controller`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from controlplane.decisions.actions import Action, RemoveReplica
from controlplane.decisions.assess import assess
from controlplane.decisions.cleanup import (
    ready_marks,
    removed_replicas,
    stale_ready_records,
    stale_shards,
)
from controlplane.decisions.cycle import Cycle, History
from controlplane.decisions.degrade import (
    DEGRADE_AFTER_S,
    form_degraded,
    short_before_retry,
    short_replicas,
)
from controlplane.decisions.form import form_missing
from controlplane.decisions.reshape import reshape
from phalanx.store.snapshot import Snapshot

_NO_HISTORY = History()


@dataclass(frozen=True, slots=True)
class Decision:
    """What to write, and what is still missing and why.

    `shortages`: by replica, why it is not as desired. `retries`: by failed replica, when it may be formed
    again, in seconds since the Unix epoch. `history`: for the next call. `wake_at`: when to reconcile again
    even if the cluster does not change.
    """

    actions: tuple[Action, ...]
    shortages: Mapping[str, str]
    retries: Mapping[str, float]
    history: History
    wake_at: float | None


def reconcile(snapshot: Snapshot, now: float, history: History = _NO_HISTORY) -> Decision:
    """Decide at `now`, in seconds since the Unix epoch; `history` comes from the previous decision.

    The snapshot that results from the actions needs no further action at the same `now`.
    """
    cycle = Cycle(snapshot, now, history)
    assess(cycle)
    # A later step may free workers that an earlier step lacked: repeat until no step makes progress.
    while form_missing(cycle) or form_degraded(cycle) or reshape(cycle):
        pass
    removed = removed_replicas(cycle)
    actions: tuple[Action, ...] = (
        *(RemoveReplica(replica, cycle.epochs[replica]) for replica in removed),
        *cycle.formed.values(),
        *ready_marks(cycle),
        *stale_shards(cycle, removed),
        *stale_ready_records(cycle, removed),
    )
    short_since = short_replicas(cycle)
    degrade_at = [since + DEGRADE_AFTER_S for since in short_since.values()]
    wakes = [at for at in (*cycle.retries.values(), *cycle.wakes, *degrade_at) if at > now]
    next_history = History(short_since | short_before_retry(cycle), cycle.suspect_since, cycle.missing_since)
    return Decision(actions, cycle.shortages, cycle.retries, next_history, min(wakes, default=None))
