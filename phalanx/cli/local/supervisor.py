"""Decides when the programs of a local cluster start, restart and stop.

Owns: the phase of every program, back-off, the order of stopping.
Does not own: processes, clocks, files (`keeper` does those).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from phalanx.cli.local.spec import Program

START_WITHIN_S = 60.0
STOP_WITHIN_S = 10.0
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
STABLE_AFTER_S = 3.0  # a program that served this long was killed: what is broken ends sooner, and again


@dataclass(frozen=True, slots=True)
class Served:
    """A program announced that it serves."""

    name: str


@dataclass(frozen=True, slots=True)
class Exited:
    """A program's process is gone, or could not be started."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Everything shall stop."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Served | Exited | StopAsked | Tick


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a program's process."""

    name: str


@dataclass(frozen=True, slots=True)
class Terminate:
    """Ask a program's process to end."""

    name: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End a program's process."""

    name: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Every program has served by now and the set of processes has changed: say what runs."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The cluster could not be started; it stops."""

    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """Every process is gone."""


Decision = Spawn | Terminate | Kill | Publish | Fail | Done


class Phase(enum.Enum):
    """Where a program is in its life."""

    WAITING = "waiting"  # for the programs that it starts after
    STARTING = "starting"
    SERVING = "serving"
    BACKOFF = "backoff"  # its process is gone
    STOPPING = "stopping"
    GONE = "gone"


@dataclass(slots=True)
class _Life:
    program: Program
    phase: Phase = Phase.WAITING
    until: float | None = None  # when the phase ends by itself
    since: float = 0.0
    served: bool = False
    restarts: int = 0  # in a row


@dataclass(slots=True)
class Supervisor:
    """Takes events and the time in seconds, returns decisions in order."""

    programs: Sequence[Program]
    stopping: bool = False
    up: bool = False
    _lives: dict[str, _Life] = field(init=False)
    _stage: int = -1
    _done: bool = False

    def __post_init__(self) -> None:
        self._lives = {program.name: _Life(program) for program in self.programs}

    def handle(self, event: Event, now: float) -> list[Decision]:
        """What follows from an event. The first call, of any kind, starts the first programs."""
        decisions: list[Decision] = []
        match event:
            case Served(name):
                decisions += self._served(self._lives[name], now)
            case Exited(name, reason):
                decisions += self._exited(self._lives[name], reason, now)
            case StopAsked():
                self.stopping = True
            case Tick():
                pass
        decisions += self._stop(now) if self.stopping else self._start(now)
        return decisions + self._overdue(now)

    def wake_at(self) -> float | None:
        """When a `Tick` is due, None when nothing waits for time."""
        return min((life.until for life in self._lives.values() if life.until is not None), default=None)

    def phase(self, name: str) -> Phase:
        """Where a program is."""
        return self._lives[name].phase

    def _served(self, life: _Life, now: float) -> list[Decision]:
        if life.phase is not Phase.STARTING:
            return []
        self._enter(life, Phase.SERVING, now)
        life.served = True
        if self.up or not all(other.served for other in self._lives.values()):
            return []
        self.up = True
        return [Publish()]

    def _exited(self, life: _Life, reason: str, now: float) -> list[Decision]:
        if life.phase in (Phase.WAITING, Phase.BACKOFF, Phase.GONE):
            return []
        if self.stopping:
            self._enter(life, Phase.GONE, now)
            return []
        if not life.served:
            self.stopping = True
            self._enter(life, Phase.GONE, now)
            return [Fail(reason)]
        if life.phase is Phase.SERVING and now - life.since >= STABLE_AFTER_S:
            life.restarts = 0
        delay = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**life.restarts)
        life.restarts += 1
        self._enter(life, Phase.BACKOFF, now, now + delay)
        return []

    def _start(self, now: float) -> list[Decision]:
        decisions: list[Decision] = []
        for life in self._lives.values():
            waited = life.phase is Phase.WAITING and all(
                self._lives[name].served for name in life.program.after
            )
            rested = life.phase is Phase.BACKOFF and life.until is not None and now >= life.until
            if waited or rested:
                self._enter(life, Phase.STARTING, now, now + START_WITHIN_S)
                decisions.append(Spawn(life.program.name))
        return [*decisions, Publish()] if decisions and self.up else decisions

    def _stop(self, now: float) -> list[Decision]:
        decisions: list[Decision] = []
        for life in self._lives.values():
            if life.phase in (Phase.WAITING, Phase.BACKOFF):
                self._enter(life, Phase.GONE, now)
        left = [life for life in self._lives.values() if life.phase is not Phase.GONE]
        if not left:
            decisions += [] if self._done else [Done()]
            self._done = True
            return decisions
        stage = min(life.program.stop_stage for life in left)
        if stage > self._stage:
            self._stage = stage
            for life in left:
                if life.program.stop_stage == stage:
                    self._enter(life, Phase.STOPPING, now, now + STOP_WITHIN_S)
                    decisions.append(Terminate(life.program.name))
        return decisions

    def _overdue(self, now: float) -> list[Decision]:
        """Kill what takes too long to start or to stop."""
        decisions: list[Decision] = []
        for life in self._lives.values():
            overdue = life.until is not None and now >= life.until
            if overdue and life.phase in (Phase.STARTING, Phase.STOPPING):
                life.until = None
                decisions.append(Kill(life.program.name))
        return decisions

    def _enter(self, life: _Life, phase: Phase, now: float, until: float | None = None) -> None:
        life.phase, life.since, life.until = phase, now, until
