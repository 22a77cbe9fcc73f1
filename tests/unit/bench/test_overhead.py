"""The statistics of `bench.overhead`."""

from __future__ import annotations

from bench.overhead import change, interval_rank


def test_the_interval_of_a_median_is_the_exact_one() -> None:
    # From tables of the sign test: at least 6 values are needed; of 100 values, take the 40th and the 61st.
    assert interval_rank(5) is None
    assert interval_rank(6) == 0
    assert interval_rank(20) == 5
    assert interval_rank(100) == 39


def test_a_change_is_said_with_its_interval() -> None:
    assert (
        change([1 + step / 100 for step in (-3, -2, -1, 1, 2, 3)])
        == "+0.00 % (95 % confidence: -3.00 to +3.00 %)"
    )
    assert "too few" in change([1.0] * 5)
