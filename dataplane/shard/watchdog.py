"""Whether an engine still computes: a hung rank must not look healthy. And whether a child runs at all.

`Watchdog` watches the leader's engine. A step of any rank that hangs keeps the leader's step from ending, and
an idle engine is asked to run a canary through all ranks. Silence past a deadline is a hang. The deadline
follows recent steps: a step of a 70B model on a CPU takes a thousand times as long as one of a small model on
a GPU.

`Pulse` watches any child by its heartbeats, which come even while the child is busy.

Pure: time is an argument, in seconds on the monotonic clock.

Owns: what is expected, and by when. Does not own: the clock (`monitor`), the engine, the
reaction (`supervisor`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

CHECK_S = 0.1  # between two checks
PAUSE_S = 0.5  # no check for so long: this process itself was paused and has not read what has come
MIN_HANG_S = 1.2  # a shorter silence is never a hang
PATIENCE = 8  # a step may take so many times the longest recent step of its size
UNKNOWN_S = 60.0  # the limit of a step while none has been timed
PROBE_S = 0.4  # an engine that is idle for so long is asked to run a canary
PROBE_SHARE = 20  # canaries take at most 1/PROBE_SHARE of an idle engine's time
NO_HEARTBEAT_S = 5.0  # a ready child that sends nothing for so long is stopped
LOADING_S = 30.0
"""The same before it is ready: imports and drivers hold the interpreter lock that the heartbeat needs."""
_RECENT = 16  # steps of a size


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask the engine to run a canary."""


@dataclass(frozen=True, slots=True)
class Silent:
    """The child makes no progress. `status` completes a sentence that begins with the child."""

    status: str


class Pulse:
    """Watches whether a child runs, also while it loads or waits for other ranks and so has no steps."""

    def __init__(self, now: float) -> None:
        self._checked = now
        self._patience = LOADING_S
        self._due = now + LOADING_S

    def heard(self, now: float) -> None:
        """The child has sent a message."""
        self._due = now + self._patience

    def ready(self) -> None:
        """The child has said that it is ready."""
        self._patience = NO_HEARTBEAT_S

    def check(self, now: float) -> Silent | None:
        """The verdict at `now`. Call it every CHECK_S."""
        since_last, self._checked = now - self._checked, now
        if since_last > PAUSE_S:
            self._due += since_last
        return Silent("is stopped: it sends no heartbeat") if now > self._due else None


class Watchdog:
    """Watches one engine of a leader from the moment when it is ready.

    Args:
        now: the current time.
        step_s: how long a small step took before that; 0 where that is not known.
    """

    def __init__(self, now: float, step_s: float = 0.0) -> None:
        self._checked = now
        self._heard = now  # the engine's last message
        self._in_flight: deque[tuple[float, int]] = deque()  # when steps began, and their tokens
        self._last_ended = now
        self._probed: float | None = None
        # How long recent steps took, by the bit length of their number of tokens.
        self._took: dict[int, deque[float]] = {}
        if step_s:
            self._learn(1, step_s)

    def began(self, tokens: int, now: float) -> None:
        """The engine has begun a step of so many tokens."""
        self._in_flight.append((now, tokens))
        self._heard = now

    def ended(self, now: float) -> None:
        """The oldest step in flight has ended."""
        if self._in_flight:
            began, tokens = self._in_flight.popleft()
            self._learn(tokens, now - max(began, self._last_ended))
        self._last_ended = self._heard = now

    def answered(self, now: float) -> None:
        """The engine has run a canary, or has work."""
        if self._probed is not None and not self._in_flight:
            self._learn(1, now - self._probed)
        self._heard, self._probed = now, None

    def check(self, now: float) -> Probe | Silent | None:
        """The reaction at `now`, if any. Call it every CHECK_S."""
        since_last, self._checked = now - self._checked, now
        if since_last > PAUSE_S:
            # The engine may have sent messages all the while: every deadline moves by the pause.
            self._in_flight = deque((began + since_last, tokens) for began, tokens in self._in_flight)
            self._probed = None if self._probed is None else self._probed + since_last
            self._heard, self._last_ended = self._heard + since_last, self._last_ended + since_last
        if self._in_flight:
            began, tokens = self._in_flight[0]
            return self._overdue(max(began, self._last_ended), tokens, f"a step of {tokens} tokens", now)
        if self._probed is not None:
            return self._overdue(self._probed, 1, "a canary", now)
        if now - self._heard < max(PROBE_S, PROBE_SHARE * (self._expected_s(1) or 0)):
            return None
        self._probed = now
        return Probe()

    def _overdue(self, since: float, tokens: int, what: str, now: float) -> Silent | None:
        expected = self._expected_s(tokens)
        allowed = UNKNOWN_S if expected is None else max(MIN_HANG_S, PATIENCE * expected)
        if now - since <= allowed:
            return None
        known = "" if expected is None else f"; at most {expected:.3f} s was expected"
        return Silent(f"hangs: {what} has not ended for {now - since:.1f} s{known}")

    def _learn(self, tokens: int, seconds: float) -> None:
        self._took.setdefault(tokens.bit_length(), deque(maxlen=_RECENT)).append(seconds)

    def _expected_s(self, tokens: int) -> float | None:
        """The longest time of recent steps of this size, or an upper bound from steps of other sizes."""
        size = tokens.bit_length()
        if not self._took:
            return None
        larger = [known for known in self._took if known >= size]
        if larger:
            return max(self._took[min(larger)])
        largest = max(self._took)
        return float(max(self._took[largest]) * 2 ** (size - largest))
