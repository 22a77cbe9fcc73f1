"""Finds the request that a client resumes: at this gateway, on a replica, or in a checkpoint.

Owns: the clients that wait until a search among the replicas has ended.
Does not own: the search (`search`), checkpoints (`checkpoints`), the single reader (`live`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from dataplane.gateway.checkpoint_plan import Restored
from dataplane.gateway.checkpoints import Checkpoints
from dataplane.gateway.dispatcher import Dispatcher
from dataplane.gateway.instructions import CancelAttempt, Instruction
from dataplane.gateway.journal import Journal
from dataplane.gateway.live import LiveRequest, LiveRequests, duplicate_request
from dataplane.gateway.resume import Ticket
from dataplane.gateway.router import Target
from phalanx.runtime.errors import PhalanxError
from phalanx.store.interface import StoreUnavailableError


@dataclass(slots=True)
class _Pending:
    """A search that runs, and the number of clients that wait for its result."""

    found: asyncio.Future[LiveRequest | None]
    waiting: int = 0
    certain: bool = True  # if nothing was found: every replica has answered no


class Resumption:
    """Finds requests for one gateway, together with its dispatcher.

    `register` makes a journal a live request, `end` ends one, `carry_out` takes its instructions.
    """

    def __init__(
        self,
        live_requests: LiveRequests,
        dispatcher: Dispatcher,
        checkpoints: Checkpoints,
        register: Callable[[Journal, str], LiveRequest],
        end: Callable[[LiveRequest], None],
        carry_out: Callable[[list[Instruction]], None],
    ) -> None:
        self._live_requests, self._dispatcher, self._checkpoints = live_requests, dispatcher, checkpoints
        self._register, self._end, self._carry_out = register, end, carry_out
        self._pending: dict[str, _Pending] = {}  # by resume key

    async def find(self, ticket: Ticket, parent: str) -> LiveRequest:
        """The request that a resume token names. `parent` is the client's W3C traceparent.

        Raises:
            PhalanxError: UNKNOWN_REQUEST when nothing holds the request any more; UNREACHABLE or
                STORE_UNAVAILABLE when that is not known yet.
        """
        live = self._live_requests.of(ticket)
        if live is not None:
            return live
        search = await self._search(ticket)
        if (live := search.found.result()) is not None:
            return live
        restored = await self._from_checkpoint(ticket, certain=search.certain)
        # Another client may have resumed the same request while this one waited for the store.
        return self._live_requests.of(ticket) or self._adopt(restored, parent)

    def found(self, target: Target, journal: Journal) -> None:
        """A replica holds a request that was searched for."""
        if journal.request_id in self._live_requests:
            # A request of the same id has ended, and its client still reads it.
            _, todo = self._dispatcher.cancel(journal.request_id)
            self._carry_out([one for one in todo if isinstance(one, CancelAttempt)])
            search = self._pending.pop(journal.resume_key)
            search.found.set_exception(duplicate_request(journal.request_id))
            search.found.exception()  # mark it as retrieved: asyncio logs an error if no client waits
            return
        live = self._register(journal, "")
        live.target, live.started = target, True
        self._finish(journal.resume_key, live, certain=True)

    def not_held(self, resume_key: str, certain: bool) -> None:
        """No replica holds a request that was searched for; `certain` if every replica has answered no."""
        self._finish(resume_key, None, certain=certain)

    async def _search(self, ticket: Ticket) -> _Pending:
        """Search the replicas and wait for the result. Clients with the same token share one search."""
        search = self._pending.get(ticket.key)
        if search is None:
            search = self._pending[ticket.key] = _Pending(asyncio.get_running_loop().create_future())
            self._carry_out(self._dispatcher.seek(ticket.model, ticket.key, time.monotonic()))
        search.waiting += 1
        try:
            await asyncio.shield(search.found)
            return search
        except asyncio.CancelledError:
            if search.found.done() and search.waiting == 1 and search.found.exception() is None:
                self._end_unread(search.found.result())
            raise
        finally:
            search.waiting -= 1

    def _finish(self, resume_key: str, live: LiveRequest | None, *, certain: bool) -> None:
        search = self._pending.pop(resume_key)
        search.certain = certain
        search.found.set_result(live)
        if not search.waiting:
            self._end_unread(live)

    def _end_unread(self, live: LiveRequest | None) -> None:
        """End a request that was found after its last client had left."""
        if live is not None and live.reader == 0 and live.journal.request_id in self._live_requests:
            self._end(live)

    async def _from_checkpoint(self, ticket: Ticket, *, certain: bool) -> Restored:
        try:
            restored = await self._checkpoints.load(ticket.key)
        except StoreUnavailableError as error:
            message = "no replica holds the request, and the store cannot be asked for its checkpoint"
            raise PhalanxError("STORE_UNAVAILABLE", message) from error
        if restored is None and not certain:
            message = "not every replica has answered whether it holds the request; resume again"
            raise PhalanxError("UNREACHABLE", message)
        if restored is None:
            message = "no replica and no checkpoint has this request any more; send it again"
            raise PhalanxError("UNKNOWN_REQUEST", message)
        return restored

    def _adopt(self, restored: Restored, parent: str) -> LiveRequest:
        """Make a request from its checkpoint live, and replay it."""
        journal = restored.journal
        if journal.request_id in self._live_requests:
            raise duplicate_request(journal.request_id)
        todo: list[Instruction] = []
        if not journal.finished:
            todo = self._dispatcher.adopt(journal, time.monotonic(), restored.timeout_s)
        live = self._register(journal, parent)
        self._carry_out(todo)
        return live
