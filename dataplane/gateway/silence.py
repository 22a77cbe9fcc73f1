"""Silence timeouts: which open streams have had no frame for too long. Pure: time is an argument.

Owns: when the last frame of each open stream came.
Does not own: closing a stream (`replicas`), the replay of its requests (`dispatcher`).
"""

from __future__ import annotations

from dataplane.gateway.router import Target

SILENCE_TIMEOUT_S = 1.5
"""A leader sends a frame every `dataplane.shard.leader.HEARTBEAT_S`, even if its engine is idle or hangs."""
OWN_PAUSE_S = 0.5
"""A longer gap between two ticks means that this gateway itself was paused and has frames left to read."""


class SilenceDetector:
    """The silence timeouts of one gateway's streams."""

    def __init__(self) -> None:
        self._last_frame: dict[Target, float] = {}
        self._last_tick: float | None = None

    def heard(self, target: Target, now: float) -> None:
        """A stream has opened, or a frame has come on it."""
        self._last_frame[target] = now

    def forget(self, target: Target) -> None:
        """A stream has closed."""
        self._last_frame.pop(target, None)

    def own_pause(self, now: float) -> float:
        """Seconds that this gateway itself was paused before this tick; every timeout is extended by them.

        0.0 while ticks come on time. Call it once per tick, before `timed_out`.
        """
        previous, self._last_tick = self._last_tick, now
        gap_s = 0.0 if previous is None else now - previous
        if gap_s <= OWN_PAUSE_S:
            return 0.0
        self._last_frame = {target: last + gap_s for target, last in self._last_frame.items()}
        return gap_s

    def timed_out(self, now: float) -> list[Target]:
        """The streams whose silence timeout has passed. Each is returned once."""
        silent = [target for target, last in self._last_frame.items() if now - last > SILENCE_TIMEOUT_S]
        for target in silent:
            del self._last_frame[target]
        return silent
