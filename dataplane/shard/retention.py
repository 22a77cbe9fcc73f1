"""Attempts by name, with a timer for each deadline and each end of retention.

A live attempt whose stream breaks goes on as an orphan: its gateway may be dead, and another gateway may ask
for the request by its resume key. A finished attempt keeps its output for the same reason. Either is dropped
at the end of its retention.

Owns: which attempts are retained, and the timers.
Does not own: the course of attempts (`requests`), the clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from dataplane.shard.attempts import Attempt

RETENTION_S = 30.0
ACKED_S = 5.0
"""Acked means written, not received: keep the output a little longer."""


class Retention:
    """Every attempt that is live or retained for another gateway. Times are in monotonic seconds."""

    def __init__(self) -> None:
        self._attempts: dict[str, Attempt] = {}  # by name
        # A heap of (time, name, id). An entry whose attempt is gone is skipped.
        self._timers: list[tuple[float, str, str]] = []

    def __len__(self) -> int:
        return len(self._attempts)

    def __iter__(self) -> Iterator[Attempt]:
        return iter(list(self._attempts.values()))

    def get(self, name: str) -> Attempt | None:
        """The attempt of this name."""
        return self._attempts.get(name)

    def add(self, attempt: Attempt) -> None:
        """Retain an attempt from its start; its deadline gets a timer."""
        self._attempts[attempt.name] = attempt
        if attempt.deadline is not None:
            self._set_timer(attempt.deadline, attempt)

    def remove(self, attempt: Attempt) -> None:
        """Drop an attempt."""
        del self._attempts[attempt.name]

    def keep(self, attempt: Attempt, now: float) -> None:
        """Retain an attempt that no gateway has, or that has finished, until RETENTION_S from now."""
        self._attempts[attempt.name] = attempt
        attempt.keep_until = now + RETENTION_S
        self._set_timer(attempt.keep_until, attempt)

    def acked(self, attempt: Attempt, now: float) -> None:
        """Retain a finished attempt for ACKED_S more at most."""
        assert attempt.keep_until is not None
        attempt.keep_until = min(attempt.keep_until, now + ACKED_S)
        self._set_timer(attempt.keep_until, attempt)

    def next_timer(self) -> float | None:
        """The time of the next timer; None without one."""
        while self._timers and self._of(self._timers[0]) is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def due(self, now: float) -> Iterator[Attempt]:
        """Attempts whose timers have expired, earliest first. The caller may remove each one."""
        while self._timers and self._timers[0][0] <= now:
            attempt = self._of(heapq.heappop(self._timers))
            if attempt is not None:
                yield attempt

    def _set_timer(self, when: float, attempt: Attempt) -> None:
        heapq.heappush(self._timers, (when, attempt.name, attempt.id))

    def _of(self, timer: tuple[float, str, str]) -> Attempt | None:
        """The attempt of a timer, unless it is gone or another attempt has taken its name."""
        _, name, id = timer
        attempt = self._attempts.get(name)
        return attempt if attempt is not None and attempt.id == id else None
