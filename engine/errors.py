"""Errors of the engine, typed so that every caller can say what to do."""

from __future__ import annotations

from errno import ENOMEM


class EngineError(Exception):
    """A failure with a machine-readable `reason` (UPPER_SNAKE_CASE) and a message for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class RequestError(EngineError):
    """The request cannot be served as it is: the caller must change it. Nobody else is affected."""


class ModelError(EngineError):
    """The model directory or its layout cannot be served; trying again will not help."""


def as_engine_error(error: Exception) -> EngineError:
    """What an engine dies of, by a reason that tells a device from a program, and from a lack of memory.

    OUT_OF_MEMORY: the device, or the host, had none left. DEVICE_FAILED: CUDA reports an error, after which
    nothing that a process holds on the device can be trusted, and only its end frees it. INTERNAL: anything
    else.
    """
    if isinstance(error, EngineError):
        return error
    kinds = {kind.__name__ for kind in type(error).__mro__}  # torch's, which this module does not import
    first = str(error).partition("\n")[0]
    no_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == ENOMEM)
    if no_memory or "OutOfMemoryError" in kinds:
        return EngineError("OUT_OF_MEMORY", f"{first} Give the engine less kv_bytes, or more ranks.")
    if "AcceleratorError" in kinds or "CUDA error" in first:
        return EngineError("DEVICE_FAILED", first)
    return EngineError("INTERNAL", f"{type(error).__name__}: {error}")
