"""Decides when the programs of a local cluster start, restart and stop. Pure.

Owns: the phase of each program, the restart back-off, the order of stopping.
Does not own: processes, clocks and files (`keeper`).
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
STABLE_AFTER_S = 3.0  # a program that served this long is not crash-looping: its back-off starts anew


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
    """The cluster is to stop."""


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
    """Every program has served, and the set of processes has changed: write cluster.json."""


@dataclass(frozen=True, slots=True)
class Fail:
    """A program ended before it served: the start has failed, and the cluster stops."""

    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """Every process is gone."""


Decision = Spawn | Terminate | Kill | Publish | Fail | Done


class Phase(enum.Enum):
    """Where a program is in its life."""

    WAITING = "waiting"  # until the programs in `after` have served
    STARTING = "starting"
    SERVING = "serving"
    BACKOFF = "backoff"  # its process has ended; it restarts later
    STOPPING = "stopping"
    GONE = "gone"


@dataclass(slots=True)
class _State:
    program: Program
    phase: Phase = Phase.WAITING
    until: float | None = None  # deadline of the phase, if it has one
    since: float = 0.0
    served: bool = False  # at least once
    restarts: int = 0  # consecutive ones


@dataclass(slots=True)
class ProcessSupervisor:
    """Takes events, each with the time in seconds; returns decisions in order."""

    programs: Sequence[Program]
    stopping: bool = False
    up: bool = False  # every program has served
    _states: dict[str, _State] = field(init=False)
    _stage: int = -1
    _done: bool = False

    def __post_init__(self) -> None:
        self._states = {program.name: _State(program) for program in self.programs}

    def handle(self, event: Event, now: float) -> list[Decision]:
        """The decisions that follow from an event. The first call starts the first programs."""
        decisions: list[Decision] = []
        match event:
            case Served(name):
                decisions += self._served(self._states[name], now)
            case Exited(name, reason):
                decisions += self._exited(self._states[name], reason, now)
            case StopAsked():
                self.stopping = True
            case Tick():
                pass
        decisions += self._stop(now) if self.stopping else self._start(now)
        return decisions + self._overdue(now)

    def wake_at(self) -> float | None:
        """When the next `Tick` is due; None when no phase has a deadline."""
        return min((state.until for state in self._states.values() if state.until is not None), default=None)

    def phase(self, name: str) -> Phase:
        """The phase of a program."""
        return self._states[name].phase

    def _served(self, state: _State, now: float) -> list[Decision]:
        if state.phase is not Phase.STARTING:
            return []
        self._enter(state, Phase.SERVING, now)
        state.served = True
        if self.up or not all(other.served for other in self._states.values()):
            return []
        self.up = True
        return [Publish()]

    def _exited(self, state: _State, reason: str, now: float) -> list[Decision]:
        if state.phase in (Phase.WAITING, Phase.BACKOFF, Phase.GONE):
            return []
        if self.stopping:
            self._enter(state, Phase.GONE, now)
            return []
        if not state.served:
            self.stopping = True
            self._enter(state, Phase.GONE, now)
            return [Fail(reason)]
        if state.phase is Phase.SERVING and now - state.since >= STABLE_AFTER_S:
            state.restarts = 0
        delay = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**state.restarts)
        state.restarts += 1
        self._enter(state, Phase.BACKOFF, now, now + delay)
        return []

    def _start(self, now: float) -> list[Decision]:
        decisions: list[Decision] = []
        for state in self._states.values():
            waited = state.phase is Phase.WAITING and all(
                self._states[name].served for name in state.program.after
            )
            rested = state.phase is Phase.BACKOFF and state.until is not None and now >= state.until
            if waited or rested:
                self._enter(state, Phase.STARTING, now, now + START_WITHIN_S)
                decisions.append(Spawn(state.program.name))
        return [*decisions, Publish()] if decisions and self.up else decisions

    def _stop(self, now: float) -> list[Decision]:
        decisions: list[Decision] = []
        for state in self._states.values():
            if state.phase in (Phase.WAITING, Phase.BACKOFF):
                self._enter(state, Phase.GONE, now)
        left = [state for state in self._states.values() if state.phase is not Phase.GONE]
        if not left:
            decisions += [] if self._done else [Done()]
            self._done = True
            return decisions
        stage = min(state.program.stop_stage for state in left)
        if stage > self._stage:
            self._stage = stage
            for state in left:
                if state.program.stop_stage == stage:
                    self._enter(state, Phase.STOPPING, now, now + STOP_WITHIN_S)
                    decisions.append(Terminate(state.program.name))
        return decisions

    def _overdue(self, now: float) -> list[Decision]:
        """Kill programs that take too long to start or to stop."""
        decisions: list[Decision] = []
        for state in self._states.values():
            overdue = state.until is not None and now >= state.until
            if overdue and state.phase in (Phase.STARTING, Phase.STOPPING):
                state.until = None
                decisions.append(Kill(state.program.name))
        return decisions

    def _enter(self, state: _State, phase: Phase, now: float, until: float | None = None) -> None:
        state.phase, state.since, state.until = phase, now, until
