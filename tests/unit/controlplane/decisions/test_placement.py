from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.decisions.placement import Shortage, place
from phalanx.store.records import DeploymentRecord, MemberRecord, WorkerRecord


def workers(**hosts: str) -> dict[str, WorkerRecord]:
    """Workers by name on their hosts, booted once."""
    return {
        name: WorkerRecord(name, f"boot-of-{name}", host, f"{name}:1", "cpu", 1)
        for name, host in hosts.items()
    }


def names(placed: tuple[MemberRecord, ...] | Shortage) -> list[str]:
    assert not isinstance(placed, Shortage)
    return [member.worker for member in placed]


def wants(tp: int = 1, pp: int = 1) -> DeploymentRecord:
    return DeploymentRecord("a", 1, "/model", tp=tp, pp=pp)


def test_a_member_carries_the_boot_and_the_address_of_its_worker() -> None:
    assert place(wants(), workers(w0="h")) == (MemberRecord("w0", "boot-of-w0", "w0:1"),)


@pytest.mark.parametrize(
    ("free", "reason"),
    [
        ({}, "needs 4 workers (tp=2 x pp=2), 0 are free"),
        ({"w0": "h"}, "needs 4 workers (tp=2 x pp=2), 1 is free"),
        ({"w0": "h", "w1": "h", "w2": "h"}, "needs 4 workers (tp=2 x pp=2), 3 are free"),
    ],
)
def test_a_shortage_says_what_is_needed_and_what_is_free(free: dict[str, str], reason: str) -> None:
    assert place(wants(2, 2), workers(**free)) == Shortage(reason)


def test_one_host_that_fits_is_preferred_to_the_first_names() -> None:
    assert names(place(wants(2), workers(w0="h0", w1="h1", w2="h1"))) == ["w1", "w2"]


def test_the_tightest_host_is_preferred() -> None:
    free = workers(w0="big", w1="big", w2="big", w3="tight", w4="tight")
    assert names(place(wants(2), free)) == ["w3", "w4"]


def test_without_a_host_that_fits_the_emptiest_is_filled_first() -> None:
    free = workers(w0="h0", w1="h1", w2="h1", w3="h2")
    assert names(place(wants(3), free)) == ["w1", "w2", "w0"]


def test_previous_members_keep_their_ranks() -> None:
    free = workers(w0="h", w1="h", w2="h", w3="h")
    assert names(place(wants(3), free, previous=["w3", "gone", "w2"])) == ["w3", "w0", "w2"]


def test_the_rest_is_sought_on_the_hosts_of_previous_members() -> None:
    free = workers(w0="h0", w1="h0", w2="h1", w3="h1", w4="h1")
    assert names(place(wants(2), free, previous=["w4", "gone"])) == ["w4", "w2"]


def test_a_shrinking_replica_keeps_its_first_ranks() -> None:
    assert names(place(wants(1), workers(w0="h", w1="h"), previous=["w1", "w0"])) == ["w1"]


def test_a_draining_worker_is_not_chosen_even_where_it_was() -> None:
    free = workers(w0="h")
    free["w1"] = WorkerRecord("w1", "boot", "h", "w1:1", "cpu", 1, draining=True)
    assert names(place(wants(1), free, previous=["w1"])) == ["w0"]


@given(
    st.lists(st.sampled_from(["h0", "h1", "h2"]), max_size=8),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.sampled_from([f"w{index}" for index in range(9)]), max_size=9, unique=True),
)
def test_a_placement_is_whole_distinct_and_independent_of_order(
    hosts: list[str], tp: int, pp: int, previous: list[str]
) -> None:
    free = workers(**{f"w{index}": host for index, host in enumerate(hosts)})
    placed = place(wants(tp, pp), free, previous)
    backwards = dict(reversed(free.items()))
    assert place(wants(tp, pp), backwards, previous) == placed
    if isinstance(placed, Shortage):
        assert len(free) < tp * pp
    else:
        assert len(placed) == len(set(names(placed))) == tp * pp
        assert set(names(placed)) <= free.keys()
