from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dataplane.shard.health import Nvml, Reading, judge

WELL = Reading(temperature_c=60, shutdown_c=92)


@pytest.mark.parametrize(
    ("reading", "word"),
    [
        (Reading(lost=True), "does not answer"),
        (Reading(xids=(31, 79)), "XID 79"),
        (Reading(remap_failed=True), "could not be remapped"),
        (Reading(uncorrected=5), "3 errors"),
        (Reading(temperature_c=90, shutdown_c=92), "90 °C"),
    ],
)
def test_a_failing_device_is_named_with_its_reason(reading: Reading, word: str) -> None:
    assert word in judge(reading, Reading(uncorrected=2)).ailment


@pytest.mark.parametrize(
    "reading",
    [
        WELL,
        Reading(xids=(13, 31, 43, 45)),
        Reading(uncorrected=2),
        Reading(temperature_c=90),
        Reading(slowed=("heat",), remap_pending=True),
    ],
)
def test_what_an_application_or_another_day_did_is_no_ailment(reading: Reading) -> None:
    assert judge(reading, Reading(uncorrected=2)).ailment == ""


def test_people_hear_of_what_is_not_yet_an_ailment() -> None:
    verdict = judge(Reading(slowed=("heat",), remap_pending=True, xids=(31,)), WELL)
    assert len(verdict.remarks) == 3


class FakeNvml:
    """The library with one device that answers only the calls in `answers`."""

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            self.value = value

    NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED, TIMEOUT = 15, 16, 10

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.xids = [79, 13]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml") or name.startswith(("nvmlClocks", "nvmlEventType")):
            return 1

        def call(*_: Any) -> Any:
            if name == "nvmlEventSetWait":
                if not self.xids:
                    raise self.NVMLError(self.TIMEOUT)
                return SimpleNamespace(eventData=self.xids.pop())
            if name in ("nvmlInit", "nvmlDeviceRegisterEvents", "nvmlEventSetCreate"):
                return object()
            if name.startswith("nvmlDeviceGetHandle"):
                return name
            if isinstance(answer := self.answers.get(name, self.NVMLError(3)), Exception):
                raise answer
            return answer

        return call


def reading_of(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> Reading:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return Nvml(0).read()


MEMORY = SimpleNamespace(free=3, total=8)


def test_a_device_that_can_tell_little_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(nvmlDeviceGetMemoryInfo=MEMORY)
    nvml.xids.clear()
    assert reading_of(monkeypatch, nvml) == Reading()


def test_all_that_a_device_tells_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(
        nvmlDeviceGetMemoryInfo=MEMORY,
        nvmlDeviceGetRemappedRows=(0, 2, 1, 0),
        nvmlDeviceGetTotalEccErrors=4,
        nvmlDeviceGetTemperature=71,
        nvmlDeviceGetTemperatureThreshold=92,
    )
    assert reading_of(monkeypatch, nvml) == Reading(
        uncorrected=4, remap_pending=True, temperature_c=71, shutdown_c=92, xids=(13, 79)
    )


def test_a_device_that_is_lost_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = FakeNvml.NVMLError(FakeNvml.NVML_ERROR_GPU_IS_LOST)
    assert reading_of(monkeypatch, FakeNvml(nvmlDeviceGetMemoryInfo=lost)).lost
