"""The transactions of the active controller: refused on an old view, split when they are large."""

from __future__ import annotations

import pytest

from controlplane.decisions.actions import FormReplica
from tests.unit.controlplane.world import World


@pytest.fixture
def world() -> World:
    return World()


def test_a_decision_on_a_view_that_lags_behind_writes_nothing(world: World) -> None:
    """Otherwise the second deployment would get the worker that the first one has just got."""
    world.boot("w0")
    world.apply("b")
    lagging = world.listing
    world.delete("b")
    world.apply("a")
    world.settle()
    decision, written = world.reconcile(lagging)
    assert [type(action) for action in decision.actions] == [FormReplica]
    assert not written
    assert list(world.snapshot.replicas) == ["a-0"]


def test_a_large_cluster_is_written_in_several_transactions(world: World) -> None:
    world.boot(*(f"w{index}" for index in range(120)))
    world.apply("a", 120)
    assert len(world.formed()) == 120
