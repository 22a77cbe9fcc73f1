"""Decides which workers form a replica. Pure.

The hosts of the previous epoch have the weights in their page cache, and collectives are fastest within one
host. So placement keeps the free workers of the previous epoch and prefers their hosts. After these it takes
the host with the fewest free workers that are enough (best fit).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from phalanx.store.records import DeploymentRecord, MemberRecord, WorkerRecord


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a replica cannot be placed, for people."""

    reason: str


def place(
    deployment: DeploymentRecord, free: Mapping[str, WorkerRecord], previous: Sequence[str] = ()
) -> tuple[MemberRecord, ...] | Shortage:
    """Members in rank order for one replica of `deployment`, from `free` workers by name.

    Draining workers are never chosen. `previous` are the workers of the previous epoch in rank order; each
    one that is still free keeps its rank. The result depends on the arguments only.
    """
    usable = {name: worker for name, worker in free.items() if not worker.draining}
    needed = deployment.shards
    if len(usable) < needed:
        return Shortage(
            f"needs {needed} worker{'s' * (needed > 1)} (tp={deployment.tp} x pp={deployment.pp}), "
            f"{len(usable)} {'is' if len(usable) == 1 else 'are'} free"
        )
    staying = {rank: name for rank, name in enumerate(previous[:needed]) if name in usable}
    candidates = [worker for name, worker in usable.items() if name not in set(staying.values())]
    hosts = {usable[name].host for name in staying.values()}
    others = iter(_by_preference(candidates, needed - len(staying), hosts))
    names = [staying[rank] if rank in staying else next(others).worker for rank in range(needed)]
    return tuple(MemberRecord(name, usable[name].incarnation, usable[name].address) for name in names)


def _by_preference(
    candidates: Sequence[WorkerRecord], needed: int, hosts: Collection[str]
) -> list[WorkerRecord]:
    """Candidates on `hosts` first, then host by host: the best fit, or without one the host with the most."""
    room = Counter(worker.host for worker in candidates)

    def rank(worker: WorkerRecord) -> tuple[bool, bool, int, str, str]:
        fits = room[worker.host] >= needed
        return (
            worker.host not in hosts,
            not fits,
            room[worker.host] if fits else -room[worker.host],
            worker.host,
            worker.worker,
        )

    return sorted(candidates, key=rank)
