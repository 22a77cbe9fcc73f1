"""Which replica takes the next attempt."""

from __future__ import annotations

from dataplane.gateway.router import Router, Target, draining
from phalanx.internal.v1 import shard_pb2
from phalanx.store.records import AssignmentRecord, DeploymentRecord, MemberRecord, WorkerRecord
from phalanx.store.snapshot import ReplicaEpoch, Snapshot


def router(*replicas: str, model_hash: str = "m") -> Router:
    made = Router()
    for replica in replicas:
        hello = shard_pb2.LeaderHello(model_hash=model_hash, max_model_len=100)
        made.add(Target(replica, 1, "d", f"{replica}:1"), hello)
    return made


def picked(made: Router) -> str | None:
    route = made.pick("d", "m", 10)
    return None if route is None else route.target.replica


def test_the_least_loaded_replica_is_picked() -> None:
    made = router("d-0", "d-1")
    made.sent("d-0", 2)
    assert picked(made) == "d-1"
    made.routes["d-1"].report(shard_pb2.Load(running=2, waiting=1))
    assert picked(made) == "d-0"


def test_a_replica_that_drains_is_picked_only_where_there_is_no_other() -> None:
    made = router("d-0", "d-1")
    made.draining = frozenset({"d-0"})
    made.sent("d-1", 50)
    assert picked(made) == "d-1"
    made.remove(Target("d-1", 1, "d", "d-1:1"))
    assert picked(made) == "d-0"


def test_a_replica_drains_with_any_of_its_workers_but_not_with_their_past_boots() -> None:
    def worker(name: str, boot: str, leaves: bool) -> WorkerRecord:
        return WorkerRecord(name, boot, "h", f"{name}:1", "cpu", 1, draining=leaves)

    def replica(name: str, *members: str) -> ReplicaEpoch:
        records = tuple(MemberRecord(member, "boot-1", f"{member}:1") for member in members)
        deployment = DeploymentRecord("d", 1, "/m", tp=len(members))
        return ReplicaEpoch(5, AssignmentRecord(name, deployment, records))

    workers = [worker("w0", "boot-1", False), worker("w1", "boot-1", True), worker("w2", "boot-2", True)]
    snapshot = Snapshot(
        workers={one.worker: one for one in workers},
        replicas={
            "d-0": replica("d-0", "w0", "w1"),
            "d-1": replica("d-1", "w2"),
            "d-2": replica("d-2", "w0"),
        },
    )
    assert draining(snapshot) == {"d-0"}
