"""A result waits for the work that its device had queued. A stand-in plays the device."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.transfer import once_done


class Event:
    """Records the calls."""

    told: list[str]

    def record(self) -> None:
        self.told.append("recorded")

    def synchronize(self) -> None:
        self.told.append("waited")


def test_a_result_waits_for_what_its_device_did_when_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Event, "told", told, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    wait = once_done(torch.device("cuda"), lambda: told.append("read"))
    assert told == ["recorded"]
    wait()
    assert told == ["recorded", "waited", "read"]


def test_a_cpu_has_done_it() -> None:
    result = object
    assert once_done(torch.device("cpu"), result) is result
