"""The gateway's shell: carries the dispatcher's instructions out, and events to it.

Owns: replica streams, spans, the events that wake clients, and which client reads which request.
Does not own: decisions (`dispatcher`), client protocols (`server`, `http`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dataplane.gateway import dispatcher as instructions
from dataplane.gateway.checkpoints import Candidate, Checkpoints, Restored
from dataplane.gateway.dispatcher import Dispatcher, Instruction
from dataplane.gateway.journal import Chunk, Journal
from dataplane.gateway.metrics import Metrics
from dataplane.gateway.replica_stream import ReplicaStream
from dataplane.gateway.resume import Cursor, Ticket
from dataplane.gateway.router import Target, draining, targets
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime import telemetry
from phalanx.runtime.errors import PhalanxError
from phalanx.store.interface import Store, StoreUnavailableError
from phalanx.store.keys import Keys
from phalanx.store.snapshot import Snapshot

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)
_TICK_S = 0.05
_RECONNECT_S = (0.05, 0.5)


_TAKEN_OVER = PhalanxError("TAKEN_OVER", "the stream goes on at another connection")


@dataclass(slots=True)
class Live:
    """A request as its client's writer sees it. One client reads it; who resumes it takes it over."""

    journal: Journal
    news: asyncio.Event = field(default_factory=asyncio.Event)
    root: Span | None = None
    attempt: Span | None = None
    opened: float = 0.0
    started: bool = False  # the first token has arrived
    target: Target | None = None  # that had its last attempt
    reader: int = 0
    why_ended: PhalanxError = _TAKEN_OVER  # the reader before

    def take_over(self, why: PhalanxError = _TAKEN_OVER) -> None:
        """End the present reader; whoever reads next is the one."""
        self.reader, self.why_ended = self.reader + 1, why
        self.news.set()

    async def accepted(self) -> None:
        """Wait until a replica has accepted the request. Raises PhalanxError if it ends before."""
        reader = self.reader
        while not self.journal.accepted and not self.journal.closed:
            self.news.clear()
            await self.news.wait()
            if reader != self.reader:
                raise self.why_ended
        if self.journal.error is not None:
            raise self.journal.error

    def chunks(self, cursor: Cursor | None = None) -> AsyncIterator[Chunk]:
        """The request's tokens from `cursor` on, at the client's pace; the caller is its reader from now on.

        Raises PhalanxError if it ends with an error, TAKEN_OVER where another client reads on.

        What piled up while the client was busy comes as one chunk: a slow client costs no memory
        beyond the journal and delays nobody.
        """
        return self._chunks(cursor or self.journal.start, self.reader)

    async def _chunks(self, cursor: Cursor, reader: int) -> AsyncIterator[Chunk]:
        while True:
            if reader != self.reader:
                raise self.why_ended
            # Both before reading: the journal goes on while the client takes what was read.
            self.news.clear()
            closed = self.journal.closed
            for chunk in self.journal.read(cursor):
                cursor = chunk.cursor
                yield chunk
            if closed:
                break
            await self.news.wait()
        if self.journal.error is not None:
            raise self.journal.error


def _duplicate(request_id: str) -> PhalanxError:
    return PhalanxError("DUPLICATE_REQUEST", f"request {request_id!r} is live already")


@dataclass(slots=True)
class _Search:
    """A request that is sought, and how many clients wait for it."""

    found: asyncio.Future[Live | None]
    waiting: int = 0
    certain: bool = True  # where nothing was found: every replica has said so


class Gateway:
    """One gateway process's dispatcher with its streams.

    `name` and `incarnation` identify it to leaders. `run` must be running for requests to move. Requests that
    are not `resumable` end with their gateway: nobody keeps anything for another one.
    """

    def __init__(
        self, name: str, incarnation: str, store: Store, keys: Keys, *, resumable: bool = True
    ) -> None:
        self.dispatcher = Dispatcher()
        self.metrics = Metrics(self.dispatcher)
        self.snapshot = Snapshot()
        self.informed = asyncio.Event()  # the store has been read once
        self._name, self._incarnation, self._resumable = name, incarnation, resumable
        self._store, self._keys = store, keys
        self._streams: dict[Target, ReplicaStream] = {}
        self._keepers: dict[Target, asyncio.Task[None]] = {}
        self._ending: dict[Target, asyncio.Task[None]] = {}  # cancelled keepers that have not ended
        self._lives: dict[str, Live] = {}
        self._searches: dict[str, _Search] = {}  # by resume key
        self._checkpoints = Checkpoints(store, keys, incarnation, self._candidates)
        self._draining = False
        self._leaving = False  # what clients leave now is not cancelled: they go on elsewhere
        self._idle = asyncio.Event()  # no client reads; of interest while draining

    # Clients

    @asynccontextmanager
    async def request(
        self, journal: Journal, *, timeout_s: float | None = None, parent: str = ""
    ) -> AsyncIterator[Live]:
        """Open a request; leaving the block ends it, in whatever state it is.

        `parent` is the client's W3C traceparent. Raises PhalanxError at once where the request cannot
        be taken.
        """
        self._check_serving()
        if journal.model not in self.snapshot.deployments:
            raise PhalanxError("UNKNOWN_MODEL", f"model {journal.model!r} is not served here", param="model")
        if journal.request_id in self._lives:  # ended, perhaps, but its client still reads
            raise _duplicate(journal.request_id)
        if not self._resumable:
            journal.template.resume_key = ""
        opened = self.dispatcher.open(journal, time.monotonic(), timeout_s)
        live = self._register(journal, parent)
        self._do(opened)
        with self._read(live):
            yield live

    @asynccontextmanager
    async def resume(self, ticket: Ticket, *, parent: str = "") -> AsyncIterator[Live]:
        """Go on with a request that this or another gateway has begun; leaving the block ends it.

        Raises PhalanxError: UNKNOWN_REQUEST when nobody has it any more; UNREACHABLE or STORE_UNAVAILABLE
        when that is not known yet.
        """
        self._check_serving()
        live = self._with(ticket)
        if live is None:
            search = await self._seek(ticket)
            live = search.found.result()
            if live is None:
                restored = await self._from_checkpoint(ticket, certain=search.certain)
                # Another client may have come with the same in the meantime.
                live = self._with(ticket) or self._adopt(restored, parent)
        live.take_over()
        with self._read(live):
            yield live

    def cancel(self, request_id: str) -> bool:
        """End a request early; returns whether it was live."""
        found, todo = self.dispatcher.cancel(request_id)
        self._do(todo)
        return found

    async def drain(self, within_s: float) -> None:
        """Take no new request, and return when the last has ended, or when the time is up.

        Requests that still run then are given up, not cancelled: their clients resume them elsewhere.
        """
        self._draining = True
        self._idle.clear()  # it may have been idle before
        if not self._lives:
            self._idle.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        self._leaving = True
        for live in self._lives.values():
            live.take_over(PhalanxError("UNREACHABLE", "this gateway shuts down; resume at another"))

    def _check_serving(self) -> None:
        if self._draining:
            raise PhalanxError("UNREACHABLE", "this gateway is shutting down; another takes the request")
        if not self.informed.is_set():
            raise PhalanxError("STORE_UNAVAILABLE", "this gateway has not seen the cluster's state yet")

    def _register(self, journal: Journal, parent: str = "") -> Live:
        live = self._lives[journal.request_id] = Live(journal, opened=time.monotonic())
        live.root = telemetry.start_span(
            "request",
            parent=parent,
            attributes={"request.id": journal.request_id, "gen_ai.request.model": journal.model},
        )
        return live

    @contextmanager
    def _read(self, live: Live) -> Iterator[None]:
        """Leaving the block ends the request, in whatever state it is, unless another client has it."""
        reader = live.reader
        try:
            yield
        finally:
            if live.reader == reader and not self._leaving:
                self._end(live)

    def _end(self, live: Live) -> None:
        journal = live.journal
        self.cancel(journal.request_id)
        stream = None if live.target is None else self._streams.get(live.target)
        if journal.finished and journal.resume_key and stream is not None:
            stream.send(shard_pb2.ServeRequest(ack=shard_pb2.Ack(resume_key=journal.resume_key)))
        del self._lives[journal.request_id]
        self._checkpoints.forget(journal.resume_key)
        self.metrics.request.observe(time.monotonic() - live.opened)
        self._end_root(live)
        if not self._lives:
            self._idle.set()

    def _with(self, ticket: Ticket) -> Live | None:
        """The request, if this gateway has it. Raises PhalanxError for another token of its key."""
        live = next((live for live in self._lives.values() if live.journal.resume_key == ticket.key), None)
        if live is not None and live.journal.ticket != ticket:
            raise PhalanxError("INVALID_ARGUMENT", "this is no resume token", param="resume_token")
        return live

    async def _seek(self, ticket: Ticket) -> _Search:
        """The search for a request among the replicas, when it has ended."""
        search = self._searches.get(ticket.key)
        if search is None:
            search = self._searches[ticket.key] = _Search(asyncio.get_running_loop().create_future())
            self._do(self.dispatcher.seek(ticket.model, ticket.key, time.monotonic()))
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

    def _attached(self, target: Target, journal: Journal) -> None:
        """A replica holds what was sought."""
        if journal.request_id in self._lives:
            # Another request of that id has ended, and its client still reads.
            _, todo = self.dispatcher.cancel(journal.request_id)
            self._do([one for one in todo if isinstance(one, instructions.CancelAttempt)])
            search = self._searches.pop(journal.resume_key)
            search.found.set_exception(_duplicate(journal.request_id))
            search.found.exception()  # or asyncio complains where nobody waits
            return
        live = self._register(journal)
        live.target, live.started = target, True
        self._found(journal.resume_key, live)

    def _found(self, key: str, live: Live | None, *, certain: bool = True) -> None:
        search = self._searches.pop(key)
        search.certain = certain
        search.found.set_result(live)
        if not search.waiting:
            self._end_unread(live)

    def _end_unread(self, live: Live | None) -> None:
        """End a request whose client did not wait until it was found."""
        if live is not None and live.reader == 0 and live.journal.request_id in self._lives:
            self._end(live)

    async def _from_checkpoint(self, ticket: Ticket, *, certain: bool) -> Restored:
        try:
            restored = await self._checkpoints.load(ticket.key)
        except StoreUnavailableError as error:
            message = "no replica holds the request, and the store, which may, cannot be asked"
            raise PhalanxError("STORE_UNAVAILABLE", message) from error
        if restored is None and not certain:
            message = "not every replica has said whether it holds the request; ask again"
            raise PhalanxError("UNREACHABLE", message)
        if restored is None:
            raise PhalanxError("UNKNOWN_REQUEST", "nobody holds this request any more; send it again")
        return restored

    def _adopt(self, restored: Restored, parent: str) -> Live:
        """Take a request from its checkpoint."""
        journal = restored.journal
        if journal.request_id in self._lives:
            raise _duplicate(journal.request_id)
        todo: list[Instruction] = []
        if not journal.finished:
            todo = self.dispatcher.adopt(journal, time.monotonic(), restored.timeout_s)
        live = self._register(journal, parent)
        self._do(todo)
        return live

    def _candidates(self) -> Iterator[Candidate]:
        for live in self._lives.values() if self._resumable else ():
            yield Candidate(live.journal, live.opened, self.dispatcher.deadline(live.journal.request_id))

    # Replicas

    async def run(self) -> None:
        """Follow the topology and keep a stream to every ready replica, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tick())
            group.create_task(self._checkpoints.run())
            async for change in self._store.watch(self._keys.root):
                self.snapshot = Snapshot.of(change.listing, self._keys)
                self.informed.set()
                self.dispatcher.router.draining = draining(self.snapshot)
                wanted = set(targets(self.snapshot, self.dispatcher.router.connected).values())
                for target in self._keepers.keys() - wanted:
                    keeper = self._ending[target] = self._keepers.pop(target)
                    keeper.add_done_callback(self._forget_keeper)
                    keeper.cancel()
                for target in wanted - self._keepers.keys():
                    before = self._ending.get(target)
                    self._keepers[target] = group.create_task(self._keep_stream(target, before))

    def _forget_keeper(self, done: asyncio.Task[None]) -> None:
        self._ending = {target: keeper for target, keeper in self._ending.items() if keeper is not done}

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._do(self.dispatcher.tick(time.monotonic()))

    async def _keep_stream(self, target: Target, before: asyncio.Task[None] | None) -> None:
        """Open the stream again whenever it breaks, as long as the topology wants it.

        One keeper at a time: a stream that comes back opens only when `before`, its last one, has ended.
        """
        if before is not None:
            await asyncio.wait([before])
        pause = _RECONNECT_S[0]
        while True:
            hello = shard_pb2.GatewayHello(
                gateway=self._name, incarnation=self._incarnation, replica=target.replica, epoch=target.epoch
            )
            stream = self._streams[target] = ReplicaStream(target, hello)
            reason, blame = PhalanxError("UNREACHABLE", "the replica has left the topology"), False
            opened = time.monotonic()
            try:
                reason = await stream.run(
                    lambda leader: self._do(self.dispatcher.stream_up(target, leader, time.monotonic())),
                    lambda frame: self._do(self.dispatcher.frame(target, frame, time.monotonic())),
                )
                blame = True
            except Exception:
                # A bug met on one stream must not end the others.
                log.exception("stream failed", extra={"replica": target.replica})
                reason, blame = PhalanxError("INTERNAL", "the gateway failed on a frame"), True
            finally:
                del self._streams[target]
                log.info(
                    "stream ended",
                    extra={"replica": target.replica, "epoch": target.epoch, "reason": reason.message},
                )
                down = self.dispatcher.stream_down(target, reason.message, time.monotonic(), blame=blame)
                self._do(down)
            pause = _RECONNECT_S[0] if time.monotonic() - opened > _RECONNECT_S[1] else pause * 2
            await asyncio.sleep(random.uniform(0, min(pause, _RECONNECT_S[1])))

    # Instructions

    def _do(self, todo: list[Instruction]) -> None:
        for instruction in todo:
            match instruction:
                case instructions.Submit():
                    self._submit(instruction)
                case instructions.CancelAttempt(target, message):
                    if stream := self._streams.get(target):
                        stream.send(shard_pb2.ServeRequest(cancel=message))
                case instructions.AttemptEnded(journal, error):
                    live = self._lives[journal.request_id]
                    telemetry.end_span(live.attempt, error=error or None)
                case instructions.Wake(journal):
                    self._wake(self._lives[journal.request_id])
                case instructions.Distrust(target, reason):
                    log.error("replica distrusted", extra={"replica": target.replica, "reason": reason})
                    self._close(target, reason)
                case instructions.HangUp(target, reason):
                    log.warning("replica silent", extra={"replica": target.replica, "reason": reason})
                    self._close(target, reason)
                case instructions.Attach(target, message):
                    self._streams[target].send(shard_pb2.ServeRequest(attach=message))
                case instructions.Found(target, journal):
                    self._attached(target, journal)
                case instructions.NotHeld(resume_key, certain):
                    self._found(resume_key, None, certain=certain)

    def _close(self, target: Target, reason: str) -> None:
        if stream := self._streams.get(target):
            stream.close(reason)

    def _submit(self, submit: instructions.Submit) -> None:
        journal, message = submit.journal, submit.message
        live = self._lives[journal.request_id]
        live.target = submit.target
        if submit.after:
            log.info(
                "request failed over",
                extra={
                    "request": journal.request_id,
                    "attempt": journal.attempts,
                    "replica": submit.target.replica,
                    "reason": submit.after,
                    "from_token": journal.tokens,
                },
            )
        if live.root is not None:
            failover: dict[str, str | int] = {}
            if submit.after:
                failover = {"failover.reason": submit.after, "replay.from_token": journal.tokens}
            live.attempt = telemetry.start_span(
                "attempt",
                parent=live.root,
                link=live.attempt.get_span_context() if live.attempt is not None else None,
                link_attributes=failover,
                attributes={
                    "request.id": journal.request_id,
                    "attempt": journal.attempts,
                    "phalanx.replica": submit.target.replica,
                    "phalanx.epoch": submit.target.epoch,
                    **failover,
                },
            )
            message.traceparent = telemetry.traceparent(live.attempt)
        self._streams[submit.target].send(shard_pb2.ServeRequest(submit=message))

    def _wake(self, live: Live) -> None:
        if not live.started and live.journal.tokens:
            live.started = True
            self.metrics.first_token.observe(time.monotonic() - live.opened)
        live.news.set()

    def _end_root(self, live: Live) -> None:
        journal, usage = live.journal, live.journal.usage
        telemetry.end_span(
            live.root,
            attributes={
                "phalanx.attempts": journal.attempts,
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
            },
            error=journal.error.reason if journal.error is not None else None,
        )
