"""Step plans and samples over loopback TCP."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from engine.distributed import channel
from engine.distributed.channel import PlanHub, PlanLink
from engine.errors import EngineError
from engine.plan import Sampled, SequenceChunk, StepPlan

PLAN = StepPlan(4, 1, chunks=(SequenceChunk(0, 0, (1, 2, 3), (0,), True),))


@contextmanager
def star(world: int, epoch: int = 4) -> Iterator[tuple[PlanHub, list[PlanLink]]]:
    hub = PlanHub("127.0.0.1", world, epoch)
    gathering = threading.Thread(target=hub.gather)
    gathering.start()
    links = [PlanLink(hub.address, epoch, rank) for rank in range(1, world)]
    gathering.join()
    try:
        yield hub, links
    finally:
        hub.close()
        for link in links:
            link.close()


def test_a_plan_reaches_every_rank_and_tokens_come_back() -> None:
    with star(3) as (hub, links):
        hub.broadcast(PLAN)
        assert [link.receive() for link in links] == [PLAN, PLAN]
        links[1].send(Sampled(1, (7,), (None,)))
        assert hub.receive(2) == Sampled(1, (7,), (None,))


def test_a_rank_sees_at_once_that_the_leader_has_gone() -> None:
    with star(2) as (hub, (link,)):
        hub.close()
        with pytest.raises(EngineError) as caught:
            link.receive()
        assert caught.value.reason == "RANK_LOST"


def test_the_leader_sees_that_any_rank_has_gone_while_it_waits_for_another() -> None:
    with star(3) as (hub, links):
        links[0].close()
        with pytest.raises(EngineError) as caught:
            hub.receive(2)
        assert caught.value.reason == "RANK_LOST"


def test_what_is_beside_plans_comes_first_or_a_busy_rank_would_never_see_its_parent_go() -> None:
    ours, theirs = socket.socketpair()
    with star(2) as (hub, (link,)), ours:
        hub.broadcast(PLAN)
        theirs.close()
        assert link.receive(beside=[ours]) is None
        assert link.receive() == PLAN


@pytest.mark.timeout(30)
def test_strangers_do_not_prolong_the_wait_for_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_ACCEPT_TIMEOUT_S", 0.3)
    hub = PlanHub("127.0.0.1", 2, 4)
    host, _, port = hub.address.rpartition(":")

    def knock() -> None:
        socket.create_connection((host, int(port))).close()

    with contextlib.closing(hub), pytest.raises(EngineError) as caught:
        hub.gather(check=knock)
    assert caught.value.reason == "RANK_LOST"


def test_strangers_and_ranks_of_another_epoch_are_turned_away() -> None:
    hub = PlanHub("127.0.0.1", 2, 4)
    host, _, port = hub.address.rpartition(":")
    with socket.create_connection((host, int(port))):
        pass
    stale = PlanLink(hub.address, 3, 1)
    right = PlanLink(hub.address, 4, 1)
    hub.gather()
    hub.broadcast(PLAN)
    assert right.receive() == PLAN
    with pytest.raises(EngineError):
        stale.receive()
    for end in (hub, stale, right):
        end.close()
