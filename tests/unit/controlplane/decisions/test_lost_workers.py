"""When the store, not the workers, is the suspected cause of lost registrations."""

from __future__ import annotations

import pytest

from controlplane.decisions.lost_workers import SUSPECT_S
from phalanx.store.registration import LEASE_TTL_S
from tests.unit.controlplane.world import World


def test_when_most_workers_go_at_once_the_store_is_suspected_and_they_may_come_back(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    world.serve("a", 2, tp=2)
    world.boot("spare0", "spare1")
    known = dict(world.snapshot.workers)
    epochs = {name: assigned.epoch for name, assigned in world.snapshot.replicas.items()}
    for name in ("w0", "w1", "w2", "w3"):
        world.die(name)
    decision = world.settle()
    assert decision.actions == ()
    assert decision.wake_at == world.now + SUSPECT_S
    for name in ("w0", "w1", "w2"):
        world.now += SUSPECT_S / 4
        world.put(world.keys.worker(name), known[name])
        assert not world.formed(), "the last one is late"
    world.put(world.keys.worker("w3"), known["w3"])
    world.ready("a-0", "a-1")
    assert not world.formed()
    assert {name: assigned.epoch for name, assigned in world.snapshot.replicas.items()} == epochs


def test_workers_that_do_not_come_back_are_replaced_after_all(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    world.serve("a", 2, tp=2)
    world.boot("spare0", "spare1")
    for name in ("w0", "w1", "w2"):
        world.die(name)
    assert not world.formed()
    world.now += SUSPECT_S
    assert world.formed() == ["a-0"]
    assert set(world.members("a-0")) <= {"spare0", "spare1", "w3"}


def test_a_worker_that_booted_again_has_died_whatever_became_of_the_others(world: World) -> None:
    world.boot("w0", "w1")
    world.serve("a", 1, tp=2)
    world.die("w1")
    world.boot("w0", "w1")
    assert world.formed() == ["a-0"]


def test_workers_that_have_long_been_missing_make_no_crowd(world: World) -> None:
    world.boot("w0", "w1", "w2", "w3")
    world.serve("a", 1, tp=3)
    world.serve("b", 1)
    world.die("w0")
    world.die("w1")
    world.settle()
    world.now += 100
    world.settle()
    world.boot("spare")
    world.die(*world.members("b-0"))
    assert world.formed() == ["b-0"]


@pytest.mark.parametrize(("apart_s", "together"), [(LEASE_TTL_S / 3, True), (2 * LEASE_TTL_S / 3, False)])
def test_leases_that_end_within_one_renewal_period_end_together(
    world: World, apart_s: float, together: bool
) -> None:
    world.boot("w0", "w1", "w2")
    world.serve("a", 1, tp=3)
    world.die("w0")
    world.settle()
    world.now += apart_s
    world.die("w1")
    world.boot("spare0", "spare1")
    assert world.formed() == ([] if together else ["a-0"])
