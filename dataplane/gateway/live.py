"""A live request and the single client that reads it.

Owns: which client is the request's reader, the event that wakes the reader.
Does not own: tokens (`journal`), where the request runs (`dispatcher`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dataplane.gateway.journal import Chunk, Journal
from dataplane.gateway.resume import Cursor, Ticket
from dataplane.gateway.router import Target
from phalanx.runtime.errors import PhalanxError

if TYPE_CHECKING:
    from opentelemetry.trace import Span


def _displaced() -> PhalanxError:
    # A new instance each time: a shared one would keep the frames, and so the journals, of every raise.
    return PhalanxError("TAKEN_OVER", "another connection has resumed this stream")


def duplicate_request(request_id: str) -> PhalanxError:
    """The error for a request whose id is in use."""
    return PhalanxError("DUPLICATE_REQUEST", f"request {request_id!r} is live already")


@dataclass(slots=True)
class LiveRequest:
    """A request as its client's connection sees it. It has one reader; a resume displaces that reader.

    A `reader` is a number: the connection that counted it up last is the current reader.
    """

    journal: Journal
    opened: float  # on the monotonic clock
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # the journal, or the reader
    request_span: Span | None = None
    attempt_span: Span | None = None
    started: bool = False  # the first token has come
    target: Target | None = None  # the replica of its last attempt
    reader: int = 0
    displaced: PhalanxError = field(default_factory=_displaced)  # the error for the reader displaced last

    def displace_reader(self, why: PhalanxError | None = None) -> None:
        """End the current reader with `why`, else TAKEN_OVER. The next to call `chunks` is the new one."""
        self.reader, self.displaced = self.reader + 1, why or _displaced()
        self.changed.set()

    async def accepted(self) -> None:
        """Wait until a replica has accepted the request. Raises PhalanxError if the request ends before."""
        reader = self.reader
        while not self.journal.accepted and not self.journal.closed:
            self.changed.clear()
            await self.changed.wait()
            if reader != self.reader:
                raise self.displaced
        if self.journal.error is not None:
            raise self.journal.error

    def chunks(self, cursor: Cursor | None = None) -> AsyncIterator[Chunk]:
        """The request's tokens from `cursor` on, at the client's pace, for the reader that calls this.

        What arrives while the client is busy comes as one chunk: a slow client costs no memory beyond the
        journal, and delays no other client.

        Raises:
            PhalanxError: the request's error, or TAKEN_OVER when another client displaces this reader.
        """
        return self._chunks(cursor or self.journal.start, self.reader)

    async def _chunks(self, cursor: Cursor, reader: int) -> AsyncIterator[Chunk]:
        while True:
            if reader != self.reader:
                raise self.displaced
            # Clear before reading, or an append during `yield` is missed. So, too, with `closed`.
            self.changed.clear()
            closed = self.journal.closed
            for chunk in self.journal.read(cursor):
                cursor = chunk.cursor
                yield chunk
            if closed:
                break
            await self.changed.wait()
        if self.journal.error is not None:
            raise self.journal.error


class LiveRequests(dict[str, LiveRequest]):
    """All live requests of a gateway by request id. One that has ended stays until its client has read it."""

    def of(self, ticket: Ticket) -> LiveRequest | None:
        """The request that a resume token names. Raises PhalanxError when the rest of the token is forged."""
        live = next((live for live in self.values() if live.journal.resume_key == ticket.key), None)
        if live is not None and live.journal.ticket != ticket:
            message = "resume_token is not one that this cluster returned"
            raise PhalanxError("INVALID_ARGUMENT", message, param="resume_token")
        return live
