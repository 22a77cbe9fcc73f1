"""The gateway's shell: carries the dispatcher's instructions out, and events to it.

Owns: replica streams, spans, and the events that wake clients.
Does not own: decisions (`dispatcher`), client protocols (`server`, `http`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from controlplane.state import Keys, Snapshot
from controlplane.store import Store
from dataplane.gateway import dispatcher as instructions
from dataplane.gateway.dispatcher import Dispatcher, Instruction
from dataplane.gateway.journal import Chunk, Journal
from dataplane.gateway.metrics import Metrics
from dataplane.gateway.replica_stream import ReplicaStream
from dataplane.gateway.router import Target, targets
from phalanx.runtime import telemetry
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import shard_pb2

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)
_TICK_S = 0.05
_RECONNECT_S = (0.05, 0.5)


@dataclass(slots=True)
class Live:
    """A request as its client's writer sees it."""

    journal: Journal
    news: asyncio.Event = field(default_factory=asyncio.Event)
    root: Span | None = None
    attempt: Span | None = None
    opened: float = 0.0
    started: bool = False  # the first token has arrived

    async def accepted(self) -> None:
        """Wait until a replica has accepted the request. Raises PhalanxError if it ends before."""
        while not self.journal.accepted and not self.journal.closed:
            self.news.clear()
            await self.news.wait()
        if self.journal.error is not None:
            raise self.journal.error

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The request's tokens at the client's pace. Raises PhalanxError if it ends with an error.

        What piled up while the client was busy comes as one chunk: a slow client costs no memory
        beyond the journal and delays nobody.
        """
        cursor = self.journal.start
        while True:
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


class Gateway:
    """One gateway process's dispatcher with its streams.

    `name` and `incarnation` identify it to leaders. `run` must be running for requests to move.
    """

    def __init__(self, name: str, incarnation: str, store: Store, keys: Keys) -> None:
        self.dispatcher = Dispatcher()
        self.metrics = Metrics(self.dispatcher)
        self.snapshot = Snapshot()
        self.informed = asyncio.Event()  # the store has been read once
        self._name, self._incarnation = name, incarnation
        self._store, self._keys = store, keys
        self._streams: dict[Target, ReplicaStream] = {}
        self._keepers: dict[Target, asyncio.Task[None]] = {}
        self._ending: dict[Target, asyncio.Task[None]] = {}  # cancelled keepers that have not ended
        self._lives: dict[str, Live] = {}

    # Clients

    @asynccontextmanager
    async def request(
        self, journal: Journal, *, timeout_s: float | None = None, parent: str = ""
    ) -> AsyncIterator[Live]:
        """Open a request; leaving the block ends it, in whatever state it is.

        `parent` is the client's W3C traceparent. Raises PhalanxError at once where the request cannot
        be taken.
        """
        if not self.informed.is_set():
            raise PhalanxError("STORE_UNAVAILABLE", "this gateway has not seen the cluster's state yet")
        if journal.model not in self.snapshot.deployments:
            raise PhalanxError("UNKNOWN_MODEL", f"model {journal.model!r} is not served here", param="model")
        if journal.request_id in self._lives:  # ended, perhaps, but its client still reads
            raise PhalanxError("DUPLICATE_REQUEST", f"request {journal.request_id!r} is live already")
        live = Live(journal, opened=time.monotonic())
        opened = self.dispatcher.open(journal, live.opened, timeout_s)
        self._lives[journal.request_id] = live
        live.root = telemetry.start_span(
            "request",
            parent=parent,
            attributes={"request.id": journal.request_id, "gen_ai.request.model": journal.model},
        )
        try:
            self._do(opened)
            yield live
        finally:
            self.cancel(journal.request_id)
            del self._lives[journal.request_id]
            self.metrics.request.observe(time.monotonic() - live.opened)
            self._end_root(live)

    def cancel(self, request_id: str) -> bool:
        """End a request early; returns whether it was live."""
        found, todo = self.dispatcher.cancel(request_id)
        self._do(todo)
        return found

    # Replicas

    async def run(self) -> None:
        """Follow the topology and keep a stream to every ready replica, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tick())
            async for change in self._store.watch(self._keys.root):
                self.snapshot = Snapshot.of(change.listing, self._keys)
                self.informed.set()
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
                    if stream := self._streams.get(target):
                        stream.close()

    def _submit(self, submit: instructions.Submit) -> None:
        journal, message = submit.journal, submit.message
        live = self._lives[journal.request_id]
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
