"""The keeper of a local cluster must not wait for a controller that does not answer."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path

import pytest

from phalanx.cli.local import keeper, retire
from phalanx.cli.local.keeper import Keeper
from phalanx.cli.local.spec import CONTROLLER, LocalSpec


@pytest.mark.parametrize("refuses", [True, False])
async def test_a_controller_that_cannot_retire_the_deployment_does_not_hold_up_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refuses: bool
) -> None:
    if not refuses:
        monkeypatch.setattr(retire, "WITHIN_S", 0.2)
        monkeypatch.setattr(keeper, "_STARTING_S", 0.0)
    retire.note(tmp_path, "demo")
    cluster = Keeper(LocalSpec(str(tmp_path), workers=1, etcd=("127.0.0.1:1",)), progress_fd=-1)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))  # a refusal until it listens, silence afterwards
        if not refuses:
            mute.listen()
        cluster._known[CONTROLLER] = {"grpc": f"127.0.0.1:{mute.getsockname()[1]}"}
        with caplog.at_level(logging.WARNING):
            async with asyncio.timeout(30):
                await cluster._retire()
    assert [record.getMessage() for record in caplog.records] == ["deployment stays in etcd"]
    assert ("TimeoutError" in vars(caplog.records[0])["reason"]) is not refuses
