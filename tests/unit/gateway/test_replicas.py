"""The tasks that keep replica streams open."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dataplane.gateway import replicas
from dataplane.gateway.replicas import ReplicaStreams
from dataplane.gateway.router import Target
from phalanx.runtime.errors import PhalanxError

TARGET = Target("demo-0", 1, "demo", "a:1")


class SlowToClose:
    """A stream that stays open until cancelled, and then takes until `closed` to end."""

    open = 0
    opened = 0
    closed: asyncio.Event

    def __init__(self, target: Target, hello: object) -> None:
        pass

    async def run(self, on_hello: object, on_frame: object) -> PhalanxError:
        cls = type(self)
        cls.open, cls.opened = cls.open + 1, cls.opened + 1
        assert cls.open == 1, "two streams to one replica"
        try:
            await asyncio.Event().wait()
        finally:
            await cls.closed.wait()
            cls.open -= 1
        raise AssertionError


async def test_a_replica_that_flaps_has_one_stream_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "ReplicaStream", SlowToClose)
    monkeypatch.setattr(SlowToClose, "closed", asyncio.Event(), raising=False)
    monkeypatch.setattr(SlowToClose, "open", 0)
    monkeypatch.setattr(SlowToClose, "opened", 0)
    down: list[Target] = []

    def on_down(target: Target, reason: str, blame: bool) -> None:
        down.append(target)

    def ignore(*_: Any) -> None:
        pass

    async def settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    streams = ReplicaStreams("g", "i", ignore, ignore, on_down)
    async with asyncio.TaskGroup() as group:
        for wanted in ({TARGET}, set(), {TARGET}, set(), {TARGET}):
            streams.keep(wanted, group)
            await settle()
        assert (SlowToClose.open, SlowToClose.opened, down) == (1, 1, [])
        SlowToClose.closed.set()
        await settle()
        assert (SlowToClose.open, SlowToClose.opened, down) == (1, 2, [TARGET])
        streams.keep(set(), group)
    assert down == [TARGET, TARGET]
