from __future__ import annotations

import asyncio
import logging

import pytest

from dataplane.shard.process import Child
from engine.ipc import wire

from .conftest import DEADLINE_S, FAKES


async def test_a_message_that_cannot_be_handled_ends_its_child_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def handle(message: wire.Message) -> None:
        if not isinstance(message, wire.Beat):
            raise RuntimeError(f"nobody awaits {type(message).__name__}")

    child = Child(FAKES.text, wire.StartText("/m"), on_spawned=lambda pid: None, on_message=handle)
    async with asyncio.timeout(DEADLINE_S):
        status = await child.run()
    assert status == "sent what could not be handled: RuntimeError('nobody awaits TextReady')"
    assert [(record.name, record.levelno) for record in caplog.records] == [
        ("dataplane.shard.process", logging.ERROR)
    ]
