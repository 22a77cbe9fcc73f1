from __future__ import annotations

import pytest

from dataplane.gateway.resume import Ticket, format_cursor
from phalanx.runtime.errors import PhalanxError

KEY = "0123456789abcdef" * 2


def test_a_ticket_survives_being_a_token() -> None:
    ticket = Ticket(KEY, 3, "org/model.v2")
    assert Ticket.parse(str(ticket)) == ticket


def test_a_cursor_survives_being_text() -> None:
    ticket = Ticket(KEY, 3, "demo")
    assert format_cursor((3, 0, 12)) == "3.0.12"
    assert ticket.cursor("3.0.12") == (3, 0, 12)
    assert ticket.cursor("") == (0, 0, 0)


@pytest.mark.parametrize(
    "token", ["", "x", KEY, f"{KEY}.1", f"{KEY}.0.demo", f"{KEY}.1.", f"{KEY[1:]}.1.demo"]
)
def test_what_is_no_ticket_is_refused(token: str) -> None:
    with pytest.raises(PhalanxError) as caught:
        Ticket.parse(token)
    assert caught.value.reason == "INVALID_ARGUMENT"


@pytest.mark.parametrize("cursor", ["1", "1.2.3", "1.-2", "1.", "a.b", "1.2\n", "1." + "9" * 11, "\u0661.2"])
def test_a_cursor_of_something_else_is_refused(cursor: str) -> None:
    with pytest.raises(PhalanxError) as caught:
        Ticket(KEY, 2, "demo").cursor(cursor)
    assert caught.value.reason == "INVALID_ARGUMENT"
