"""How long a leader waits for a controller before it starts its replica's next life."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from dataplane.shard.events import ControllerTimedOut, Event
from dataplane.shard.forming import PATIENCE_CAP_S, PATIENCE_S, Forming
from dataplane.shard.supervisor import ShardSupervisor
from phalanx.store.records import ShardRecord, ShardState

FAILED = ShardRecord("d-0", 0, 10, "w0", "i", ShardState.FAILED, reason="the engine exited", text_pid=7)


class Timers:
    """Stands in for the event loop: notes the timers that are set."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        self.events: list[Event] = []

    def call_later(self, delay_s: float, call: Callable[[Event], None], event: Event) -> None:
        self.delays.append(delay_s)
        self.events.append(event)


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> Timers:
    timers = Timers()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: timers)
    return timers


def forming() -> Forming:
    supervisor = ShardSupervisor("w0", "i", "h", "cpu")
    return Forming("w0", supervisor, start_task=lambda work: work.close(), handle=lambda event: None)


def test_each_life_that_fails_soon_doubles_the_time_up_to_a_limit(timers: Timers) -> None:
    leader = forming()
    for life in range(12):
        leader.wait_for_controller(replace(FAILED, life=life))
    assert timers.delays[:3] == [PATIENCE_S, 2 * PATIENCE_S, 4 * PATIENCE_S]
    assert timers.delays[-1] == PATIENCE_CAP_S
    assert timers.events[1] == ControllerTimedOut(10, 1)


def test_a_failed_life_is_counted_once_even_if_its_status_is_published_again(timers: Timers) -> None:
    leader = forming()
    leader.wait_for_controller(FAILED)
    leader.wait_for_controller(replace(FAILED, text_pid=0))
    leader.wait_for_controller(replace(FAILED, life=1))
    assert timers.delays == [PATIENCE_S, 2 * PATIENCE_S]


def test_only_the_leader_waits_and_only_if_another_life_may_succeed(timers: Timers) -> None:
    leader = forming()
    leader.wait_for_controller(replace(FAILED, rank=1))
    leader.wait_for_controller(replace(FAILED, permanent=True))
    assert timers.delays == []
