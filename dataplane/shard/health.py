"""The health of a GPU by its own counters: a failing device is found before an engine on it fails.

`judge` decides; `Nvml` reads, through NVIDIA's management library. XIDs 13, 31, 43 and 45 are ignored: they
report errors of an application, not of the device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

_FATAL_XIDS = {
    48: "a double-bit error of its memory",
    63: "a page of its memory that is to be retired",
    64: "a page of its memory that could not be retired",
    74: "an NVLink error",
    79: "having fallen off the bus",
    94: "a contained error of its memory",
    95: "an uncontained error of its memory",
    119: "a system processor that does not answer",
    120: "an error of its system processor",
}
"""Hardware errors in NVIDIA's list "XID Errors" (docs.nvidia.com/deploy/xid-errors)."""
_SHUTDOWN_MARGIN_C = 3


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of a GPU at one time. Counters start when the driver is loaded."""

    lost: bool = False  # the device does not answer the driver
    uncorrected: int = 0  # memory errors
    remap_failed: bool = False
    remap_pending: bool = False
    temperature_c: int = 0
    shutdown_c: int = 0  # the temperature at which the device turns itself off; 0: unknown
    slowed: tuple[str, ...] = ()  # reasons for which the hardware reduces its clocks
    xids: tuple[int, ...] = ()  # reported since the previous reading


@dataclass(frozen=True, slots=True)
class Verdict:
    """`ailment`: why the device should get no work, empty if it is healthy. `remarks` are for people."""

    ailment: str = ""
    remarks: tuple[str, ...] = ()


def judge(reading: Reading, first: Reading) -> Verdict:
    """Judge a reading. Errors that the worker's `first` reading counts already are ignored."""
    if reading.lost:
        return Verdict("the device does not answer its driver")
    for xid in reading.xids:
        if xid in _FATAL_XIDS:
            return Verdict(f"the driver reports XID {xid}: {_FATAL_XIDS[xid]}")
    if reading.remap_failed:
        return Verdict("broken rows of its memory could not be remapped")
    if reading.uncorrected > first.uncorrected:
        return Verdict(f"{reading.uncorrected - first.uncorrected} errors of its memory were not corrected")
    if reading.shutdown_c and reading.temperature_c >= reading.shutdown_c - _SHUTDOWN_MARGIN_C:
        return Verdict(f"{reading.temperature_c} °C: it turns itself off at {reading.shutdown_c} °C")
    remarks = [f"XID {xid}" for xid in reading.xids]
    remarks += [f"slowed down: {why}" for why in reading.slowed]
    if reading.remap_pending:
        remarks.append("rows of its memory are to be remapped at the next reset")
    return Verdict("", tuple(remarks))


class Nvml:
    """Readings of one GPU. Owns: the library's handle and its events.

    Args:
        index: as CUDA counts.

    Raises:
        pynvml.NVMLError: there is no driver, or no such device.
    """

    def __init__(self, index: int) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        self._handle = handle_of(pynvml, index)
        self._events: Any = None
        try:
            self._events = pynvml.nvmlEventSetCreate()
            pynvml.nvmlDeviceRegisterEvents(self._handle, pynvml.nvmlEventTypeXidCriticalError, self._events)
        except pynvml.NVMLError:
            self._events = None  # not on every GPU, nor in every container

    def read(self) -> Reading:
        """Read the device now. Values that it does not report are those of a healthy device."""
        nvml, handle = self._nvml, self._handle
        try:
            nvml.nvmlDeviceGetMemoryInfo(handle)  # every device that is there answers this
        except nvml.NVMLError as error:
            gone = (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED)
            return Reading(lost=getattr(error, "value", None) in gone)
        remapped = self._ask("nvmlDeviceGetRemappedRows", default=(0, 0, 0, 0))
        return Reading(
            uncorrected=self._ask(
                "nvmlDeviceGetTotalEccErrors",
                nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                nvml.NVML_VOLATILE_ECC,
                default=0,
            ),
            remap_pending=bool(remapped[2]),
            remap_failed=bool(remapped[3]),
            temperature_c=self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU, default=0),
            shutdown_c=self._ask(
                "nvmlDeviceGetTemperatureThreshold", nvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN, default=0
            ),
            slowed=self._slowed(),
            xids=self._xids(),
        )

    def _ask(self, name: str, *arguments: Any, default: Any) -> Any:
        try:
            return getattr(self._nvml, name)(self._handle, *arguments)
        except (self._nvml.NVMLError, AttributeError):
            return default

    def _slowed(self) -> tuple[str, ...]:
        nvml, bits = self._nvml, self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", default=0)
        reasons = {
            nvml.nvmlClocksThrottleReasonHwThermalSlowdown: "heat",
            nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "the host's power supply",
            nvml.nvmlClocksThrottleReasonHwSlowdown: "heat or power",
        }
        return tuple(why for bit, why in reasons.items() if bits & bit)

    def _xids(self) -> tuple[int, ...]:
        """XIDs that the driver has reported since the previous call."""
        found: list[int] = []
        while self._events is not None:
            try:
                found.append(int(self._nvml.nvmlEventSetWait(self._events, 0).eventData))
            except self._nvml.NVMLError:  # a time-out: there is no more
                break
        return tuple(found)


def handle_of(pynvml: Any, index: int) -> Any:
    """NVML's handle of a device by its CUDA index: CUDA counts visible devices only, NVML counts all."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    name = visible[index] if visible else str(index)
    by_index: bool = name.isdecimal()
    return (
        pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(name)
    )
