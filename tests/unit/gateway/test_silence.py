"""Silence timeouts, and the pauses of the gateway itself that extend them."""

from __future__ import annotations

from dataplane.gateway.router import Target
from dataplane.gateway.silence import OWN_PAUSE_S, SILENCE_TIMEOUT_S, SilenceDetector

TARGET = Target("demo-0", 1, "demo", "a:1")


def test_the_time_before_the_first_tick_is_no_pause() -> None:
    detector = SilenceDetector()
    detector.heard(TARGET, 1000.0)
    assert detector.own_pause(1000.1) == 0.0
    assert detector.timed_out(1000.0 + SILENCE_TIMEOUT_S) == []
    assert detector.timed_out(1000.1 + SILENCE_TIMEOUT_S) == [TARGET]


def test_a_pause_extends_every_timeout_by_its_length() -> None:
    detector = SilenceDetector()
    detector.heard(TARGET, 0.0)
    assert detector.own_pause(0.0) == 0.0
    assert detector.own_pause(OWN_PAUSE_S) == 0.0
    assert detector.own_pause(OWN_PAUSE_S + 30.0) == 30.0
    assert detector.timed_out(30.0 + SILENCE_TIMEOUT_S) == []
    assert detector.timed_out(30.1 + SILENCE_TIMEOUT_S) == [TARGET]
