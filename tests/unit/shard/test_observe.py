from __future__ import annotations

from dataclasses import replace

from dataplane.shard import events
from dataplane.shard.observe import observe
from phalanx.store.records import AssignmentRecord, DeploymentRecord, MemberRecord, ShardRecord, ShardState
from phalanx.store.snapshot import ReplicaEpoch, Snapshot

DEPLOYMENT = DeploymentRecord(
    "d", 1, "/m", tp=2, dtype="float32", max_model_len=64, load_format="dummy", quantization="int8"
)
MEMBERS = (MemberRecord("w0", "boot-0", "h:1"), MemberRecord("w1", "boot-1", "h:2"))
FORMED = ReplicaEpoch(10, AssignmentRecord("d-0", DEPLOYMENT, MEMBERS))
RANK_0 = ShardRecord("d-0", 0, 10, "w0", "boot-0", ShardState.STARTING, rendezvous="h:9")
PLACE = events.RankAssigned(
    "d-0",
    1,
    10,
    "/m",
    2,
    1,
    "float32",
    64,
    load_format="dummy",
    quantization="int8",
    addresses=("h:1", "h:2"),
)


def test_a_member_hears_its_place() -> None:
    assert observe(Snapshot(replicas={"d-0": FORMED}), "w1", "boot-1") == [PLACE]


def test_another_boot_of_the_same_worker_holds_nothing() -> None:
    assert observe(Snapshot(replicas={"d-0": FORMED}), "w1", "boot-2") == [events.RankUnassigned()]


def test_of_two_places_the_newer_counts() -> None:
    old = ReplicaEpoch(5, AssignmentRecord("e-0", DEPLOYMENT, MEMBERS))
    (place,) = observe(Snapshot(replicas={"e-0": old, "d-0": FORMED}), "w1", "boot-1")
    assert place == PLACE


def test_the_rendezvous_of_rank_0_is_heard_in_its_epoch_only() -> None:
    now = Snapshot(replicas={"d-0": FORMED}, shards={("d-0", 0): RANK_0})
    assert observe(now, "w1", "boot-1") == [PLACE, events.RendezvousSeen(10, "h:9")]
    past = Snapshot(replicas={"d-0": FORMED}, shards={("d-0", 0): replace(RANK_0, epoch=9)})
    assert observe(past, "w1", "boot-1") == [PLACE]


def test_what_others_say_comes_with_their_life() -> None:
    said = replace(RANK_0, life=3, state=ShardState.FAILED, reason="broken")
    heard = observe(Snapshot(replicas={"d-0": FORMED}, shards={("d-0", 0): said}), "w1", "boot-1")
    assert events.RendezvousSeen(10, "h:9", life=3) in heard
    assert events.PeerFailed(10, 0, "broken", permanent=False, life=3) in heard


def test_the_failure_of_another_shard_is_heard_but_not_ones_own() -> None:
    failed = replace(RANK_0, rank=1, state=ShardState.FAILED, reason="broken", permanent=True, rendezvous="")
    snapshot = Snapshot(replicas={"d-0": FORMED}, shards={("d-0", 1): failed})
    assert events.PeerFailed(10, 1, "broken", permanent=True) in observe(snapshot, "w0", "boot-0")
    assert observe(snapshot, "w1", "boot-1") == [PLACE]
