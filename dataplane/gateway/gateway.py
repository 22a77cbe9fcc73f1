"""The gateway behind both client protocols. It feeds the dispatcher and carries out its instructions.

Owns: the live requests of this process, and their ends; the latest view of the cluster.
Does not own: decisions (`dispatcher`), streams to replicas (`replicas`), client protocols (`server`, `http`),
checkpoints in the store (`checkpoints`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from dataplane.gateway import instructions, tracing
from dataplane.gateway.checkpoint_plan import Candidate
from dataplane.gateway.checkpoints import Checkpoints
from dataplane.gateway.dispatcher import Dispatcher
from dataplane.gateway.instructions import Instruction
from dataplane.gateway.journal import Journal
from dataplane.gateway.live import LiveRequest, LiveRequests, duplicate_request
from dataplane.gateway.metrics import Metrics
from dataplane.gateway.replicas import ReplicaStreams
from dataplane.gateway.resume import Ticket
from dataplane.gateway.resumption import Resumption
from dataplane.gateway.router import Target, draining, targets
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.store.interface import Store
from phalanx.store.keys import Keys
from phalanx.store.snapshot import Snapshot

log = logging.getLogger(__name__)
_TICK_S = 0.05


class Gateway:
    """One gateway process. `run` must be running, or requests make no progress.

    `name` and `incarnation` identify it to leaders. With `resumable` False requests end with their gateway:
    neither leaders nor the store keep anything for another gateway.
    """

    def __init__(
        self, name: str, incarnation: str, store: Store, keys: Keys, *, resumable: bool = True
    ) -> None:
        self.dispatcher = Dispatcher()
        self.metrics = Metrics(self.dispatcher)
        self.snapshot = Snapshot()
        self.informed = asyncio.Event()  # the store has been read once
        self._resumable, self._store, self._keys = resumable, store, keys
        self._live_requests = LiveRequests()
        self._replicas = ReplicaStreams(name, incarnation, self._stream_up, self._frame, self._stream_down)
        self._checkpoints = Checkpoints(store, keys, incarnation, self._candidates)
        self._resumption = Resumption(
            self._live_requests, self.dispatcher, self._checkpoints, self._register, self._end, self._do
        )
        self._draining = False
        self._leaving = False  # do not cancel requests any more: clients resume them at another gateway
        self._idle = asyncio.Event()  # no request is live; maintained for `drain`

    # Clients

    @asynccontextmanager
    async def request(
        self, journal: Journal, *, timeout_s: float | None = None, parent: str = ""
    ) -> AsyncIterator[LiveRequest]:
        """Open a request. Leaving the block ends the request, finished or not.

        `parent` is the client's W3C traceparent. Raises PhalanxError at once when the request cannot be
        taken.
        """
        self._check_serving()
        if journal.model not in self.snapshot.deployments:
            raise PhalanxError("UNKNOWN_MODEL", f"model {journal.model!r} is not served here", param="model")
        if journal.request_id in self._live_requests:  # it may have ended, but its client still reads
            raise duplicate_request(journal.request_id)
        if not self._resumable:
            journal.template.resume_key = ""
        opened = self.dispatcher.open(journal, time.monotonic(), timeout_s)
        live = self._register(journal, parent)
        self._do(opened)
        with self._read(live):
            yield live

    @asynccontextmanager
    async def resume(self, ticket: Ticket, *, parent: str = "") -> AsyncIterator[LiveRequest]:
        """Continue a request that this or another gateway began. Leaving the block ends the request.

        Raises:
            PhalanxError: UNKNOWN_REQUEST when nothing holds the request any more; UNREACHABLE or
                STORE_UNAVAILABLE when that is not known yet.
        """
        self._check_serving()
        live = await self._resumption.find(ticket, parent)
        live.displace_reader()
        with self._read(live):
            yield live

    def cancel(self, request_id: str) -> bool:
        """End a request early. Returns whether it was live."""
        found, todo = self.dispatcher.cancel(request_id)
        self._do(todo)
        return found

    async def drain(self, within_s: float) -> None:
        """Take no new requests. Return when the last one has ended, or after `within_s`.

        Requests that still run then are not cancelled: their clients resume them at another gateway.
        """
        self._draining = True
        self._idle.clear()  # it may have been set before draining
        if not self._live_requests:
            self._idle.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        self._leaving = True
        for live in self._live_requests.values():
            live.displace_reader(PhalanxError("UNREACHABLE", "this gateway shuts down; resume at another"))

    def _check_serving(self) -> None:
        if self._draining:
            raise PhalanxError("UNREACHABLE", "this gateway is shutting down; another takes the request")
        if not self.informed.is_set():
            raise PhalanxError("STORE_UNAVAILABLE", "this gateway has not seen the cluster's state yet")

    def _register(self, journal: Journal, parent: str) -> LiveRequest:
        live = self._live_requests[journal.request_id] = LiveRequest(journal, opened=time.monotonic())
        tracing.start_request(live, parent)
        return live

    @contextmanager
    def _read(self, live: LiveRequest) -> Iterator[None]:
        """Leaving the block ends the request, finished or not, unless its reader was displaced."""
        reader = live.reader
        try:
            yield
        finally:
            if live.reader == reader:
                self._end(live)

    def _end(self, live: LiveRequest) -> None:
        """End a request. Does nothing while this gateway leaves: its replica keeps it for another gateway."""
        if self._leaving:
            return
        journal = live.journal
        self.cancel(journal.request_id)
        if journal.finished and journal.resume_key and live.target is not None:
            ack = shard_pb2.Ack(resume_key=journal.resume_key)
            self._replicas.send_if_open(live.target, shard_pb2.ServeRequest(ack=ack))
        del self._live_requests[journal.request_id]
        self._checkpoints.forget(journal.resume_key)
        self.metrics.request.observe(time.monotonic() - live.opened)
        tracing.end_request(live)
        if not self._live_requests:
            self._idle.set()

    def _candidates(self) -> Iterator[Candidate]:
        """The requests that may need a checkpoint."""
        for live in self._live_requests.values() if self._resumable else ():
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
                router = self.dispatcher.router
                router.draining = draining(self.snapshot)
                self._replicas.keep(set(targets(self.snapshot, router.connected).values()), group)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._do(self.dispatcher.tick(time.monotonic()))

    def _stream_up(self, target: Target, leader: shard_pb2.LeaderHello) -> None:
        self._do(self.dispatcher.stream_up(target, leader, time.monotonic()))

    def _frame(self, target: Target, frame: shard_pb2.StepFrame) -> None:
        self._do(self.dispatcher.frame(target, frame, time.monotonic()))

    def _stream_down(self, target: Target, reason: str, blame: bool) -> None:
        self._do(self.dispatcher.stream_down(target, reason, time.monotonic(), blame=blame))

    # Instructions

    def _do(self, todo: list[Instruction]) -> None:
        for instruction in todo:
            match instruction:
                case instructions.Wake(journal):  # first: there is one per frame and request
                    self._wake(self._live_requests[journal.request_id])
                case instructions.Submit():
                    self._submit(instruction)
                case instructions.CancelAttempt(target, message):
                    self._replicas.send_if_open(target, shard_pb2.ServeRequest(cancel=message))
                case instructions.AttemptEnded(journal, error):
                    tracing.end_attempt(self._live_requests[journal.request_id], error)
                case instructions.Distrust(target, reason):
                    log.error("replica distrusted", extra={"replica": target.replica, "reason": reason})
                    self._replicas.close(target, reason)
                case instructions.CloseSilent(target, reason):
                    log.warning("replica silent", extra={"replica": target.replica, "reason": reason})
                    self._replicas.close(target, reason)
                case instructions.Attach(target, message):
                    self._replicas.send(target, shard_pb2.ServeRequest(attach=message))
                case instructions.Found(target, journal):
                    self._resumption.found(target, journal)
                case instructions.NotHeld(resume_key, certain):
                    self._resumption.not_held(resume_key, certain)

    def _submit(self, submit: instructions.Submit) -> None:
        journal = submit.journal
        live = self._live_requests[journal.request_id]
        live.target = submit.target
        if submit.failover_reason:
            log.info(
                "request failed over",
                extra={
                    "request": journal.request_id,
                    "attempt": journal.attempts,
                    "replica": submit.target.replica,
                    "reason": submit.failover_reason,
                    "from_token": journal.tokens,
                },
            )
        tracing.start_attempt(live, submit)
        self._replicas.send(submit.target, shard_pb2.ServeRequest(submit=submit.message))

    def _wake(self, live: LiveRequest) -> None:
        if not live.started and live.journal.tokens:
            live.started = True
            self.metrics.first_token.observe(time.monotonic() - live.opened)
        live.changed.set()
