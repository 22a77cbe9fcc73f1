"""Whether an engine still computes, from what the leader's engine says: a hung rank must not look healthy.
And whether a child runs at all, whatever it does: from its beats.

A step of any rank that hangs keeps the leader's from ending, and an idle engine is asked to run a canary
through all ranks. Silence past a deadline is a hang. The deadline follows the steps of late: a step of a
70B model on a CPU takes a thousand times as long as one of a small model on a GPU.

Pure: time comes in as an argument, in seconds of a monotonic clock.

Owns: what is expected, and by when. Does not own: the clock, the engine, what follows (`supervisor`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

CHECK_S = 0.1  # between two checks
PAUSE_S = 0.5  # no check for so long: this process itself stood still, and has not read what has come
LEAST_S = 1.2  # silence that is never a hang
PATIENCE = 8  # times the longest of the recent steps of this size
UNKNOWN_S = 60.0  # for a step when there has been none yet
PROBE_S = 0.4  # idle for so long: time for a canary, but
PROBE_SHARE = 20  # canaries take no more than one part in so many of the engine's time
NO_BEAT_S = 5.0  # a child that is ready and silent for so long is stopped
LOADING_S = 30.0  # before it is ready: imports and drivers hold the interpreter, and a thread that would beat
_RECENT = 16  # steps of a size


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask the engine to run a canary."""


@dataclass(frozen=True, slots=True)
class Silent:
    """The child does nothing any more. `status` completes a sentence that begins with it."""

    status: str


class Pulse:
    """Watches whether a child runs: one that loads, or waits for others to join, has no steps to watch."""

    def __init__(self, now: float) -> None:
        self._checked = now
        self._patience = LOADING_S
        self._due = now + LOADING_S

    def heard(self, now: float) -> None:
        """The child has said something."""
        self._due = now + self._patience

    def ready(self) -> None:
        """The child has said that it is ready."""
        self._patience = NO_BEAT_S

    def check(self, now: float) -> Silent | None:
        """The verdict at `now`; to be asked every CHECK_S."""
        stood_still, self._checked = now - self._checked, now
        if stood_still > PAUSE_S:
            self._due += stood_still
        return Silent("is stopped: it says nothing, not even that it runs") if now > self._due else None


class Watchdog:
    """Watches one engine of a leader from the moment when it is ready.

    `step_s` is how long a small step took before that; 0 where it is not known.
    """

    def __init__(self, now: float, step_s: float = 0.0) -> None:
        self._checked = now
        self._heard = now  # of the engine, whatever it said
        self._in_flight: deque[tuple[float, int]] = deque()  # when steps began, and their tokens
        self._step = 0  # the last step that has ended
        self._ended = now  # when
        self._probed: float | None = None
        # By the bit length of a step's tokens: how long steps of late took.
        self._took: dict[int, deque[float]] = {}
        if step_s:
            self._learn(1, step_s)

    def began(self, tokens: int, now: float) -> None:
        """The engine has begun a step of so many tokens."""
        self._in_flight.append((now, tokens))
        self._heard = now

    def reported(self, step: int, now: float) -> None:
        """The engine has said what there is to say after step number `step`, which may have ended before."""
        if step > self._step:
            if self._in_flight:
                began, tokens = self._in_flight.popleft()
                self._learn(tokens, now - max(began, self._ended))
            self._step, self._ended = step, now
        self._heard = now

    def answered(self, now: float) -> None:
        """The engine has run a canary, or has work."""
        if self._probed is not None and not self._in_flight:
            self._learn(1, now - self._probed)
        self._heard, self._probed = now, None

    def check(self, now: float) -> Probe | Silent | None:
        """What is to be done at `now`; to be asked every CHECK_S."""
        stood_still = now - self._checked
        self._checked = now
        if stood_still > PAUSE_S:
            # The engine may have spoken all the while: what was due is due as much later.
            self._in_flight = deque((began + stood_still, tokens) for began, tokens in self._in_flight)
            self._probed = None if self._probed is None else self._probed + stood_still
            self._heard, self._ended = self._heard + stood_still, self._ended + stood_still
        if self._in_flight:
            began, tokens = self._in_flight[0]
            return self._overdue(max(began, self._ended), tokens, f"a step of {tokens} tokens", now)
        if self._probed is not None:
            return self._overdue(self._probed, 1, "a canary", now)
        if now - self._heard < max(PROBE_S, PROBE_SHARE * (self._usual(1) or 0)):
            return None
        self._probed = now
        return Probe()

    def _overdue(self, since: float, tokens: int, what: str, now: float) -> Silent | None:
        usual = self._usual(tokens)
        allowed = UNKNOWN_S if usual is None else max(LEAST_S, PATIENCE * usual)
        if now - since <= allowed:
            return None
        known = "" if usual is None else f"; {usual:.3f} s is the most that was to be expected"
        return Silent(f"hangs: {what} has not ended for {now - since:.1f} s{known}")

    def _learn(self, tokens: int, seconds: float) -> None:
        self._took.setdefault(tokens.bit_length(), deque(maxlen=_RECENT)).append(seconds)

    def _usual(self, tokens: int) -> float | None:
        """The longest time that steps of this size took of late, or what others let expect at most."""
        size = tokens.bit_length()
        if not self._took:
            return None
        larger = [known for known in self._took if known >= size]
        if larger:
            return max(self._took[min(larger)])
        largest = max(self._took)
        return float(max(self._took[largest]) * 2 ** (size - largest))
