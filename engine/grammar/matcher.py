"""The interface by which the scheduler follows an output through its grammar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from engine.request import FinishReason


class Matcher(Protocol):
    """Follows one output through its grammar, token by token."""

    @property
    def finish(self) -> FinishReason | None:
        """Set when no token may follow: "stop" at the end of the grammar, "length" in a dead end."""

    def accept(self, token_id: int) -> None:
        """Append a token to the output. The mask must have allowed it."""

    def mask(self) -> bytes:
        """The token ids that are allowed next, as a bit mask: see `plan.Mask`."""


MakeMatcher = Callable[[Sequence[int]], Matcher]
"""Makes a matcher for the continuation of an output. Raises RequestError if the output breaks the grammar."""
