"""The watchdog: it tells a hang from a slow step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dataplane.shard.watchdog import (
    CHECK_S,
    LOADING_S,
    MIN_HANG_S,
    NO_HEARTBEAT_S,
    PATIENCE,
    PAUSE_S,
    PROBE_S,
    PROBE_SHARE,
    UNKNOWN_S,
    Probe,
    Pulse,
    Silent,
    Watchdog,
)


class Engine:
    """An engine under a watchdog, in virtual time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.watchdog = Watchdog(self.now)
        self.probes = 0

    def wait(self, seconds: float) -> Silent | None:
        """Let time pass with checks; the first verdict ends it."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + CHECK_S)
            match self.watchdog.check(self.now):
                case Probe():
                    self.probes += 1
                case Silent() as verdict:
                    return verdict
        return None

    def run(self, tokens: int, seconds: float) -> Silent | None:
        """A step from its beginning to its end."""
        self.watchdog.began(tokens, self.now)
        verdict = self.wait(seconds)
        self.watchdog.ended(self.now)
        return verdict

    def answer(self, seconds: float = 0.01) -> None:
        """Idle until it is probed, then run the canary."""
        probes = self.probes
        while self.probes == probes:
            assert self.wait(CHECK_S) is None
        self.now += seconds
        self.watchdog.answered(self.now)


def warm() -> Engine:
    engine = Engine()
    engine.answer()
    return engine


def silence(engine: Engine, most: float) -> float:
    """Seconds until the watchdog gives up on an engine that sends nothing more."""
    start = engine.now
    assert engine.wait(most) is not None
    return engine.now - start


def test_an_idle_engine_is_probed_again_and_again() -> None:
    engine = warm()
    start = engine.now
    engine.answer()
    engine.answer()
    assert engine.probes == 3
    assert engine.now - start < 2 * (PROBE_S + 2 * CHECK_S)


def test_a_probe_is_not_repeated_before_its_answer() -> None:
    engine = warm()
    assert engine.wait(PROBE_S + MIN_HANG_S) is None
    assert engine.probes == 2


def test_an_idle_engine_that_hangs_is_noticed_within_two_seconds() -> None:
    assert silence(warm(), 10) < 2.0


def test_a_busy_engine_that_hangs_is_noticed_within_two_seconds() -> None:
    engine = warm()
    for _ in range(20):
        assert engine.run(16, 0.02) is None
    engine.watchdog.began(16, engine.now)
    verdict = engine.wait(2.0)
    assert verdict is not None
    assert verdict.status.startswith("hangs: a step of 16 tokens has not ended for 1.")


def test_an_engine_that_answers_probes_but_ends_no_step_is_noticed_too() -> None:
    engine = warm()
    engine.run(16, 0.02)
    engine.watchdog.began(16, engine.now)
    for _ in range(5):
        assert engine.wait(0.2) is None
        engine.watchdog.answered(engine.now)
    assert engine.wait(0.5) is not None


def test_the_first_step_of_all_may_take_long() -> None:
    engine = Engine()
    assert engine.run(512, UNKNOWN_S - 1) is None


def test_slow_steps_get_more_time_once_they_are_known() -> None:
    engine = warm()
    engine.run(16, 1.0)
    assert engine.run(16, PATIENCE * 0.9) is None


def test_a_step_larger_than_any_before_may_take_as_much_longer() -> None:
    engine = warm()
    engine.run(1, 0.5)
    assert engine.run(512, 100.0) is None


def test_a_small_step_is_not_measured_by_a_larger_one_of_its_own_time() -> None:
    engine = warm()
    engine.run(512, 3.0)
    engine.run(1, 0.05)
    engine.watchdog.began(1, engine.now)
    assert engine.wait(2.0) is not None


def test_canaries_take_a_small_share_of_a_slow_engines_time() -> None:
    engine = Engine()
    engine.answer(0.5)
    start = engine.now
    engine.answer(0.5)
    assert engine.now - start > PROBE_SHARE * 0.5


def test_the_steps_of_a_pipeline_are_measured_one_after_another() -> None:
    engine = warm()
    for step in range(1, 50):
        engine.watchdog.began(8, engine.now)
        assert engine.wait(0.1) is None
        if step > 1:
            engine.watchdog.ended(engine.now)
    assert engine.wait(2.0) is not None


def test_a_process_that_stood_still_itself_accuses_nobody() -> None:
    engine = warm()
    engine.watchdog.began(16, engine.now)
    engine.now += 30.0
    assert engine.watchdog.check(engine.now) is None
    engine.watchdog.ended(engine.now)
    assert engine.wait(PROBE_S) is None


@given(st.lists(st.tuples(st.integers(1, 2048), st.floats(0.001, MIN_HANG_S - CHECK_S), st.floats(0, 3))))
def test_an_engine_that_answers_in_time_is_never_accused(
    steps: list[tuple[int, float, float]],
) -> None:
    engine = warm()
    for tokens, seconds, idle in steps:
        assert engine.run(tokens, seconds) is None
        end = engine.now + idle
        while engine.now < end:
            probes = engine.probes
            assert engine.wait(min(CHECK_S, end - engine.now)) is None
            if engine.probes > probes:
                engine.watchdog.answered(engine.now)


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(0.001, 0.1)), min_size=1), st.booleans())
def test_a_hang_is_always_noticed(steps: list[tuple[int, float]], busy: bool) -> None:
    engine = warm()
    for tokens, seconds in steps:
        assert engine.run(tokens, seconds) is None
    if busy:
        engine.watchdog.began(steps[-1][0], engine.now)
    longest = max(seconds for _, seconds in steps)
    assert (
        silence(engine, 60)
        < PROBE_SHARE * longest + max(MIN_HANG_S, PATIENCE * longest) + 4 * CHECK_S + PAUSE_S
    )


def test_an_engine_that_hangs_before_its_first_step_is_noticed_by_what_it_took_to_get_ready() -> None:
    dog = Watchdog(0.0, step_s=0.005)
    silent = [now for now in (i * CHECK_S for i in range(100)) if isinstance(dog.check(now), Silent)]
    assert silent[0] < PROBE_S + MIN_HANG_S + 3 * CHECK_S


def verdict(pulse: Pulse, since: float, seconds: float) -> bool:
    """Whether a child that sends nothing for so long is taken for stopped."""
    checks = int(seconds / CHECK_S)
    return any(pulse.check(since + CHECK_S * (check + 1)) for check in range(checks))


def test_a_child_that_loads_has_more_patience() -> None:
    assert not verdict(Pulse(100.0), 100.0, LOADING_S - 1)
    assert verdict(Pulse(100.0), 100.0, LOADING_S + 1)
    pulse = Pulse(100.0)
    pulse.heard(110.0)
    assert not verdict(pulse, 100.0, LOADING_S + 9)


def test_a_child_that_is_ready_and_stops_beating_is_given_up() -> None:
    pulse = Pulse(100.0)
    pulse.ready()
    pulse.heard(100.0)
    assert not verdict(pulse, 100.0, NO_HEARTBEAT_S - 0.5)
    pulse.heard(100.0 + NO_HEARTBEAT_S - 0.5)
    assert verdict(pulse, 100.0 + NO_HEARTBEAT_S - 0.5, NO_HEARTBEAT_S + 0.5)


def test_a_worker_that_stood_still_does_not_blame_its_children() -> None:
    pulse = Pulse(100.0)
    pulse.ready()
    pulse.heard(100.0)
    assert pulse.check(100.0 + 20 * NO_HEARTBEAT_S) is None
    assert pulse.check(100.1 + 20 * NO_HEARTBEAT_S) is None
