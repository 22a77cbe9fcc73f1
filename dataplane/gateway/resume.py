"""What a client needs to go on with a stream elsewhere: where it is, and which stream it was. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from phalanx.runtime.errors import PhalanxError

Cursor = tuple[int, ...]
"""The next output position wanted, per choice."""

_TICKET = re.compile(r"([0-9a-f]{32})\.([1-9][0-9]{0,3})\.(.+)", re.DOTALL)
_CURSOR = re.compile(r"[0-9]{1,10}(\.[0-9]{1,10})*")


def format_cursor(cursor: Cursor) -> str:
    """The cursor as clients see it: one number per choice, separated by dots."""
    return ".".join(map(str, cursor))


@dataclass(frozen=True, slots=True)
class Ticket:
    """A resume token's content: the request's secret key, how many choices it has, its deployment."""

    key: str
    choices: int
    model: str

    def __str__(self) -> str:
        return f"{self.key}.{self.choices}.{self.model}" if self.key else ""

    @classmethod
    def parse(cls, token: str) -> Self:
        """The ticket in a resume token. Raises PhalanxError INVALID_ARGUMENT."""
        match = _TICKET.fullmatch(token)
        if match is None:
            raise PhalanxError("INVALID_ARGUMENT", "this is no resume token", param="resume_token")
        return cls(match[1], int(match[2]), match[3])

    def cursor(self, text: str) -> Cursor:
        """A cursor of this request, as `format_cursor` wrote it; empty is the beginning.

        Raises PhalanxError INVALID_ARGUMENT.
        """
        if not text:
            return (0,) * self.choices
        if not _CURSOR.fullmatch(text) or text.count(".") != self.choices - 1:
            message = f"a cursor of this request has {self.choices} numbers, separated by dots"
            raise PhalanxError("INVALID_ARGUMENT", message, param="cursor")
        return tuple(map(int, text.split(".")))
