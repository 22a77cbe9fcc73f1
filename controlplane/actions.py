"""The guarded transactions that carry out a decision. Pure.

Each transaction holds only while the leader key is the one that this controller created, and only if
no leader has written since the snapshot was taken: every one of them rewrites the leader key, whose
mod_revision the next one compares. So a decision made on a view that lags behind the controller's own
last write cannot give a worker to two replicas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from controlplane.reconcile import Action, Forget, Form, MarkReady, Prune, Remove
from phalanx.store.interface import Condition, Created, Delete, Modified, Operation, Put
from phalanx.store.keys import Keys
from phalanx.store.records import encode

MAX_ACTIONS = 50  # of at most two operations and one condition each; etcd takes 128 of either


@dataclass(frozen=True, slots=True)
class Leadership:
    """What a leader needs to write.

    `fence` is the create_revision of the leader key, `value` what it holds, under `lease`.
    """

    key: str
    value: bytes
    lease: int
    fence: int


def transactions(actions: Sequence[Action]) -> Iterator[Sequence[Action]]:
    """The actions in order, in groups that fit a transaction."""
    for start in range(0, len(actions), MAX_ACTIONS):
        yield actions[start : start + MAX_ACTIONS]


def guarded(
    actions: Sequence[Action], keys: Keys, leadership: Leadership, modified: int
) -> tuple[list[Condition], list[Operation]]:
    """Conditions and operations of one group; `modified` is the leader key's last mod_revision."""
    when: list[Condition] = [
        Created(leadership.key, leadership.fence),
        Modified(leadership.key, modified),
    ]
    then: list[Operation] = [Put(leadership.key, leadership.value, leadership.lease)]
    for action in actions:
        match action:
            case Form(assignment, epoch):
                key = keys.assignment(assignment.replica)
                when.append(Modified(key, epoch))
                then.append(Put(key, encode(assignment)))
            case Remove(replica, epoch):
                key = keys.assignment(replica)
                when.append(Modified(key, epoch))
                then.append(Delete(key))
            case Forget(replica):
                then.append(Delete(keys.ready(replica)))
            case MarkReady(ready):
                when.append(Modified(keys.assignment(ready.replica), ready.epoch))
                then.append(Put(keys.ready(ready.replica), encode(ready)))
            case Prune(replica, rank):
                then.append(Delete(keys.shard(replica, rank)))
    return when, then
