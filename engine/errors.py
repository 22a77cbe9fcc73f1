"""Errors of the engine, typed so that every caller can tell what to do."""

from __future__ import annotations

from errno import ENOMEM


class EngineError(Exception):
    """A failure with a machine-readable `reason` (UPPER_SNAKE_CASE) and a message for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class RequestError(EngineError):
    """The request cannot be served as it is: the caller must change it. No other request is affected."""


class ModelError(EngineError):
    """The model directory or its layout cannot be served; trying again will not help."""


def as_engine_error(error: Exception) -> EngineError:
    """The typed error for what ends an engine.

    An EngineError stays itself. The reasons of the others:

    - OUT_OF_MEMORY: the device or the host has no memory left.
    - DEVICE_FAILED: CUDA reports an error. The process can no longer trust its data on the device, and only
      its end frees the device.
    - INTERNAL: anything else, probably a bug.
    """
    if isinstance(error, EngineError):
        return error
    names = {kind.__name__ for kind in type(error).__mro__}  # by name: this module does not import torch
    first_line = str(error).partition("\n")[0]
    no_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == ENOMEM)
    if no_memory or "OutOfMemoryError" in names:
        return EngineError("OUT_OF_MEMORY", f"{first_line} Give the engine less kv_bytes, or more ranks.")
    if "AcceleratorError" in names or "CUDA error" in first_line:
        return EngineError("DEVICE_FAILED", first_line)
    return EngineError("INTERNAL", f"{type(error).__name__}: {error}")
