"""The core that keeps a local cluster's programs running, under generated event orders."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phalanx.cli.local.spec import LocalSpec, programs
from phalanx.cli.local.supervisor import (
    BACKOFF_FIRST_S,
    BACKOFF_MAX_S,
    STABLE_AFTER_S,
    START_WITHIN_S,
    STOP_WITHIN_S,
    Done,
    Exited,
    Fail,
    Kill,
    Phase,
    ProcessSupervisor,
    Publish,
    Served,
    Spawn,
    StopAsked,
    Terminate,
    Tick,
)

SPEC = LocalSpec(state_dir="/nowhere", workers=2)
NAMES = [program.name for program in programs(SPEC)]


def started(now: float = 0.0) -> ProcessSupervisor:
    """A supervisor whose programs have all served."""
    core = ProcessSupervisor(programs(SPEC))
    core.handle(Tick(), now)
    for name in NAMES:
        core.handle(Served(name), now)
    assert core.up
    return core


def test_etcd_starts_alone_and_the_others_once_it_serves():
    core = ProcessSupervisor(programs(SPEC))
    assert core.handle(Tick(), 0.0) == [Spawn("etcd-0")]
    assert core.handle(Served("etcd-0"), 1.0) == [Spawn(name) for name in NAMES[1:]]


def test_publishes_when_the_last_program_first_serves():
    core = ProcessSupervisor(programs(SPEC))
    core.handle(Tick(), 0.0)
    for name in NAMES[:-1]:
        assert Publish() not in core.handle(Served(name), 1.0)
    assert core.handle(Served(NAMES[-1]), 1.0) == [Publish()]


def test_a_program_that_ends_before_it_served_fails_the_start():
    core = ProcessSupervisor(programs(SPEC))
    core.handle(Tick(), 0.0)
    core.handle(Served("etcd-0"), 0.0)
    decisions = core.handle(Exited("worker-0", "no such device"), 1.0)
    assert decisions[0] == Fail("no such device")
    assert Terminate("gateway-0") in decisions


def test_a_program_that_does_not_get_ready_is_killed():
    core = ProcessSupervisor(programs(SPEC))
    core.handle(Tick(), 0.0)
    assert core.handle(Tick(), START_WITHIN_S) == [Kill("etcd-0")]


def test_a_program_that_dies_is_started_again_and_published():
    core = started()
    assert core.handle(Exited("worker-1", "killed"), 1.0) == []
    assert core.wake_at() == 1.0 + BACKOFF_FIRST_S
    assert core.handle(Tick(), 1.0 + BACKOFF_FIRST_S) == [Spawn("worker-1"), Publish()]


def test_back_off_doubles_up_to_its_limit():
    core, now, delays = started(), 1.0, []
    for _ in range(8):
        core.handle(Exited("worker-1", "killed"), now)
        wake = core.wake_at()
        assert wake is not None
        delays.append(round(wake - now, 6))
        now = wake
        core.handle(Tick(), now)
    assert delays[:3] == [BACKOFF_FIRST_S, 2 * BACKOFF_FIRST_S, 4 * BACKOFF_FIRST_S]
    assert delays[-1] == BACKOFF_MAX_S


def test_back_off_starts_anew_after_a_long_life():
    core = started()
    core.handle(Exited("worker-1", "killed"), 1.0)
    core.handle(Tick(), 2.0)
    core.handle(Served("worker-1"), 2.0)
    core.handle(Exited("worker-1", "killed"), 2.0 + STABLE_AFTER_S)
    assert core.wake_at() == 2.0 + STABLE_AFTER_S + BACKOFF_FIRST_S


def test_stops_gateway_then_controller_then_workers_then_etcd():
    core = started()
    assert core.handle(StopAsked(), 1.0) == [Terminate("gateway-0")]
    assert core.handle(Exited("gateway-0", ""), 2.0) == [Terminate("controller-0")]
    assert core.handle(Exited("controller-0", ""), 3.0) == [Terminate("worker-0"), Terminate("worker-1")]
    assert core.handle(Exited("worker-0", ""), 4.0) == []
    assert core.handle(Exited("worker-1", ""), 4.0) == [Terminate("etcd-0")]
    assert core.handle(Exited("etcd-0", ""), 5.0) == [Done()]


def test_a_program_that_ignores_sigterm_is_killed():
    core = started()
    core.handle(StopAsked(), 1.0)
    assert core.handle(Tick(), 1.0 + STOP_WITHIN_S) == [Kill("gateway-0")]


class Cluster(RuleBasedStateMachine):
    """Processes that serve, die and obey in any order, under one supervisor."""

    def __init__(self) -> None:
        super().__init__()
        self.core = ProcessSupervisor(programs(SPEC))
        self.now = 0.0
        self.alive: set[str] = set()
        self.terminated: set[str] = set()
        self.stopped = self.done = False
        self.feed(Tick())

    def feed(self, event: object) -> None:
        for decision in self.core.handle(event, self.now):  # type: ignore[arg-type]
            match decision:
                case Spawn(name):
                    assert not self.stopped, "nothing starts after the stop"
                    assert name not in self.alive, "one process per program"
                    self.alive.add(name)
                case Terminate(name):
                    earlier = {p.name for p in programs(SPEC) if p.stop_stage < self.stage(name)}
                    assert not earlier & self.alive, "an earlier stage still runs"
                    self.terminated.add(name)
                case Kill(name):
                    if name in self.alive:
                        self.alive.discard(name)
                        self.feed(Exited(name, "killed"))
                case Fail():
                    self.stopped = True
                case Done():
                    assert not self.done, "done is said once"
                    self.done = True

    @staticmethod
    def stage(name: str) -> int:
        return next(p.stop_stage for p in programs(SPEC) if p.name == name)

    @rule(name=st.sampled_from(NAMES))
    def serve(self, name: str) -> None:
        if name in self.alive:
            self.feed(Served(name))

    @rule(name=st.sampled_from(NAMES))
    def die(self, name: str) -> None:
        if name in self.alive:
            self.alive.discard(name)
            self.feed(Exited(name, "died"))

    @rule(seconds=st.floats(0.01, 40.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick())

    @precondition(lambda self: not self.stopped)
    @rule()
    def stop(self) -> None:
        self.stopped = True
        self.feed(StopAsked())

    @invariant()
    def nothing_is_forgotten(self) -> None:
        """While it runs, every program that is not alive waits for a time or for another program."""
        for name in NAMES:
            phase = self.core.phase(name)
            if phase in (Phase.STARTING, Phase.SERVING):
                assert name in self.alive
            if phase is Phase.BACKOFF:
                assert self.core.wake_at() is not None
                assert name not in self.alive

    def teardown(self) -> None:
        """From any state, a stop ends everything within the deadlines of its stages."""
        if not self.stopped:
            self.stop()
        for _ in range(5):
            if not self.done:
                self.wait(STOP_WITHIN_S)
        assert self.done
        assert not self.alive


TestCluster = Cluster.TestCase
