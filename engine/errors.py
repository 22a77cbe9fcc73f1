"""Errors of the engine, typed so that every caller can say what to do."""

from __future__ import annotations


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
