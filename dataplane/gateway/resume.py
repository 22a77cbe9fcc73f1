"""The two opaque strings with which a client resumes a stream: its resume token and its cursor. Pure."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Self

from phalanx.runtime import opaque
from phalanx.runtime.errors import PhalanxError

Cursor = tuple[int, ...]
"""Per choice, the next output position that a client wants. Past a choice's end: one more than its tokens."""

_TICKET = re.compile(r"([0-9a-f]{32})\.([1-9][0-9]{0,3})\.(.+)", re.DOTALL)
_CURSOR_VERSION = 1


def format_cursor(cursor: Cursor) -> str:
    """The cursor as clients get it: an opaque string of a version byte and one uint32 per choice."""
    return opaque.encode(struct.pack(f">B{len(cursor)}I", _CURSOR_VERSION, *cursor))


@dataclass(frozen=True, slots=True)
class Ticket:
    """A resume token's content: the request's secret key, its number of choices, its deployment."""

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
            message = "resume_token is not one that this cluster returned"
            raise PhalanxError("INVALID_ARGUMENT", message, param="resume_token")
        return cls(match[1], int(match[2]), match[3])

    def cursor(self, text: str) -> Cursor:
        """A cursor of this request from the string that `format_cursor` made; empty is the beginning.

        Raises PhalanxError INVALID_ARGUMENT.
        """
        if not text:
            return (0,) * self.choices
        try:
            version, *cursor = struct.unpack(f">B{self.choices}I", opaque.decode(text))
        except (ValueError, struct.error):
            version = 0
        if version != _CURSOR_VERSION:
            message = (
                "cursor is not one of this stream; send the cursor of the last event received, or none to "
                "begin again"
            )
            raise PhalanxError("INVALID_ARGUMENT", message, param="cursor")
        return tuple(cursor)
