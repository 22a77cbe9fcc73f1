from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.gateway.resume import Ticket, format_cursor
from phalanx.runtime import opaque
from phalanx.runtime.errors import PhalanxError

KEY = "0123456789abcdef" * 2


def ticket(choices: int) -> Ticket:
    return Ticket(KEY, choices, "demo")


def test_a_ticket_survives_being_a_token() -> None:
    sent = Ticket(KEY, 3, "org/model.v2")
    assert Ticket.parse(str(sent)) == sent


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=16))
def test_a_cursor_survives_being_text(positions: list[int]) -> None:
    cursor = tuple(positions)
    assert ticket(len(cursor)).cursor(format_cursor(cursor)) == cursor


def test_no_cursor_is_the_beginning() -> None:
    assert ticket(3).cursor("") == (0, 0, 0)


def test_a_cursor_fits_into_an_event_id_and_a_header() -> None:
    text = format_cursor((3, 0, 2**32 - 1))
    assert text.replace("-", "").replace("_", "").isalnum()
    assert text.isascii()


@pytest.mark.parametrize(
    "token", ["", "x", KEY, f"{KEY}.1", f"{KEY}.0.demo", f"{KEY}.1.", f"{KEY[1:]}.1.demo"]
)
def test_what_is_no_ticket_is_refused(token: str) -> None:
    with pytest.raises(PhalanxError) as caught:
        Ticket.parse(token)
    assert caught.value.reason == "INVALID_ARGUMENT"


VALID = format_cursor((1, 2))


@pytest.mark.parametrize(
    "cursor",
    [
        "1.2",  # the form that a client could read and make
        format_cursor((1,)),
        format_cursor((1, 2, 3)),
        opaque.encode(struct.pack(">B2I", 2, 1, 2)),  # of another version
        VALID + "A",
        VALID[:-1],
        VALID + "==",
        VALID + "\n",
        f" {VALID}",
        VALID.replace("A", "\u0410"),
        "====",
    ],
)
def test_a_cursor_of_something_else_is_refused(cursor: str) -> None:
    with pytest.raises(PhalanxError) as caught:
        ticket(2).cursor(cursor)
    assert (caught.value.reason, caught.value.param) == ("INVALID_ARGUMENT", "cursor")
    assert "the cursor of the last event received" in caught.value.message


@given(st.text(max_size=24))
def test_any_text_is_a_cursor_in_one_spelling_or_refused(text: str) -> None:
    try:
        cursor = ticket(2).cursor(text)
    except PhalanxError:
        return
    assert text in ("", format_cursor(cursor))
