"""Fences former controllers: a write succeeds only for the controller that holds the lock now. Pure.

Every transaction of the active controller compares two revisions of the lock's key:

- its create_revision, the fencing token. The next controller creates the key anew, so the writes of a former
  controller fail, even while its own lease lives.
- its mod_revision in the snapshot that the decision was made on. Every write rewrites the key, so a
  decision from before the controller's own last write fails. Without this check it could give one worker to
  two replicas.

`controlplane.election` takes the lock. `controlplane.active_controller` writes with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from controlplane.decisions.actions import (
    Action,
    ForgetReady,
    FormReplica,
    MarkReady,
    PruneShard,
    RemoveReplica,
)
from phalanx.store.interface import Condition, Created, Delete, Modified, Operation, Put
from phalanx.store.keys import Keys
from phalanx.store.records import encode

MAX_ACTIONS = 50  # each adds at most one condition and one operation; etcd allows 128 of each


@dataclass(frozen=True, slots=True)
class Lock:
    """The controller lock as its holder created it: `value` at `key`, under `lease`.

    `fence`: the fencing token, the create_revision of the key.
    """

    key: str
    value: bytes
    lease: int
    fence: int


def batches(actions: Sequence[Action]) -> Iterator[Sequence[Action]]:
    """The actions in order, in batches that each fit into one transaction."""
    for start in range(0, len(actions), MAX_ACTIONS):
        yield actions[start : start + MAX_ACTIONS]


def fenced(
    actions: Sequence[Action], keys: Keys, lock: Lock, modified: int
) -> tuple[list[Condition], list[Operation]]:
    """The transaction for one batch; `modified` is the last known mod_revision of the lock's key."""
    when: list[Condition] = [Created(lock.key, lock.fence), Modified(lock.key, modified)]
    then: list[Operation] = [Put(lock.key, lock.value, lock.lease)]
    for action in actions:
        match action:
            case FormReplica(assignment, epoch):
                key = keys.assignment(assignment.replica)
                when.append(Modified(key, epoch))
                then.append(Put(key, encode(assignment)))
            case RemoveReplica(replica, epoch):
                key = keys.assignment(replica)
                when.append(Modified(key, epoch))
                then.append(Delete(key))
            case MarkReady(ready):
                when.append(Modified(keys.assignment(ready.replica), ready.epoch))
                then.append(Put(keys.ready(ready.replica), encode(ready)))
            case ForgetReady(replica):
                then.append(Delete(keys.ready(replica)))
            case PruneShard(replica, rank):
                then.append(Delete(keys.shard(replica, rank)))
    return when, then
