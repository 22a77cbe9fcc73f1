"""The search for a resumed request: every way in which replicas answer, or cannot."""

from __future__ import annotations

import itertools

from dataplane.gateway.instructions import Attach, Instruction, NotHeld
from dataplane.gateway.router import Target
from dataplane.gateway.search import SEARCH_TIMEOUT_S, Searches

KEY = "k" * 32
ONE, OTHER = Target("demo-0", 1, "demo", "a:1"), Target("demo-1", 1, "demo", "a:2")


def begun(*targets: Target) -> tuple[Searches, list[int]]:
    """A search at these replicas, and the attempt numbers that they were offered."""
    searches = Searches(itertools.count(1))
    asked = searches.begin(KEY, targets, 0.0)
    assert all(isinstance(todo, Attach) for todo in asked)
    return searches, [todo.message.attempt for todo in asked if isinstance(todo, Attach)]


def test_it_is_certain_when_every_replica_has_said_no() -> None:
    searches, (first, second) = begun(ONE, OTHER)
    assert searches.answered_no(first) == []
    assert searches.answered_no(second) == [NotHeld(KEY, certain=True)]


def test_a_replica_that_could_not_answer_makes_it_uncertain_whichever_comes_first() -> None:
    def lost(searches: Searches) -> list[Instruction]:
        return searches.stream_down(OTHER)

    def denied(searches: Searches) -> list[Instruction]:
        return searches.answered_no(1)

    for order in ((lost, denied), (denied, lost)):
        searches, _ = begun(ONE, OTHER)
        assert [todo for answer in order for todo in answer(searches)] == [NotHeld(KEY, certain=False)]


def test_a_replica_that_answered_no_and_went_leaves_it_certain() -> None:
    searches, (first, second) = begun(ONE, OTHER)
    searches.answered_no(second)
    assert searches.stream_down(OTHER) == []
    assert searches.answered_no(first) == [NotHeld(KEY, certain=True)]


def test_without_a_replica_nothing_is_certain() -> None:
    assert Searches(itertools.count(1)).begin(KEY, [], 0.0) == [NotHeld(KEY, certain=False)]


def test_it_times_out_and_a_pause_of_this_gateway_extends_it() -> None:
    searches, _ = begun(ONE)
    searches.extend(3.0)
    assert searches.tick(SEARCH_TIMEOUT_S + 2.9) == []
    assert searches.tick(SEARCH_TIMEOUT_S + 3.0) == [NotHeld(KEY, certain=False)]
    assert searches.tick(SEARCH_TIMEOUT_S + 9.0) == []


def test_the_replica_that_holds_the_request_ends_it_once_and_only_if_it_was_asked() -> None:
    searches, (first, second) = begun(ONE, OTHER)
    assert not searches.claim(KEY, first, OTHER), "another replica's number"
    assert not searches.claim(KEY, 99, ONE)
    assert searches.claim(KEY, second, OTHER)
    assert not searches.claim(KEY, first, ONE), "too late"
    assert searches.answered_no(first) == []


def test_a_key_is_searched_for_once_at_a_time() -> None:
    searches, (first,) = begun(ONE)
    assert searches.begin(KEY, [OTHER], 0.5) == []
    assert searches.answered_no(first) == [NotHeld(KEY)]
    assert len(searches.begin(KEY, [OTHER], 1.0)) == 1
