"""The lives of an epoch: how a failed replica starts again without the store and without a controller.

A controller may assign the replica to better workers, or remove it, so the leader first gives a controller
time. Then the leader starts its engine anew and asks the workers of the other ranks to do the same.

Owns: how long the leader waits, and the questions to other workers.
Does not own: how a worker starts its rank (`supervisor`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

from dataplane.shard import peers
from dataplane.shard.events import AskPeerToStart, ControllerTimedOut, Event, LeaderStartedLife, PeerFailed
from dataplane.shard.supervisor import ShardSupervisor
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.store.records import ShardRecord, ShardState

PATIENCE_S, PATIENCE_CAP_S = 0.5, 30.0
"""A controller's time to assign a failed replica anew. Each life that fails within `LIVED_S` doubles it."""
LIVED_S = 60.0
_ASK_AGAIN_S = 0.5

log = logging.getLogger(__name__)


class Forming:
    """Starts lives: as a leader by asking, as another rank by answering.

    Args:
        worker: this worker's name.
        supervisor: knows this worker's rank.
        start_task: runs a coroutine for as long as the worker runs.
        handle: gives events to the supervisor and carries out its instructions.
    """

    def __init__(
        self,
        worker: str,
        supervisor: ShardSupervisor,
        *,
        start_task: Callable[[Coroutine[Any, Any, None]], object],
        handle: Callable[[Event], None],
    ) -> None:
        self._worker, self._supervisor = worker, supervisor
        self._start_task, self._handle = start_task, handle
        self._quick_failures, self._failed_at = 0, -math.inf  # lives in a row that failed within LIVED_S
        self._failed: tuple[str, int, int] | None = None  # replica, epoch and life that failed last

    def wait_for_controller(self, failed: ShardRecord) -> None:
        """Give a controller time after a failure of the replica that this worker leads."""
        life = failed.replica, failed.epoch, failed.life
        # The status of a failed life is published again when its text process ends, too.
        if failed.rank != 0 or failed.permanent or life == self._failed:
            return
        self._failed = life
        now = time.monotonic()
        self._quick_failures = self._quick_failures + 1 if now - self._failed_at < LIVED_S else 0
        self._failed_at = now
        delay_s = min(PATIENCE_CAP_S, PATIENCE_S * 2.0 ** min(self._quick_failures, 10))
        timed_out = ControllerTimedOut(failed.epoch, failed.life)
        asyncio.get_running_loop().call_later(delay_s, self._handle, timed_out)

    def ask(self, question: AskPeerToStart) -> None:
        """Ask a peer for its engine, again and again until the whole group has joined or the life is over.

        The answers say when the peer fails. The store would say so too, but is not needed to start a life.
        """
        self._start_task(self._ask(question))

    async def _ask(self, question: AskPeerToStart) -> None:
        epoch, life = question.epoch, question.life
        request = shard_pb2.FormRequest(
            replica=question.replica, epoch=epoch, life=life, rendezvous=question.rendezvous
        )
        while self._is_current(question):
            try:
                answer = await peers.ask_to_start(question.address, request)
                if answer.failed:
                    self._handle(PeerFailed(epoch, question.rank, answer.reason, answer.permanent, life))
            except PhalanxError as error:
                extra = {"address": question.address, "reason": error.message}
                log.warning("a rank does not join", extra=extra)
            await asyncio.sleep(_ASK_AGAIN_S)

    def _is_current(self, question: AskPeerToStart) -> bool:
        record = self._supervisor.record
        return record is not None and (record.replica, record.epoch, record.life, record.state) == (
            question.replica, question.epoch, question.life, ShardState.STARTING,
        )  # fmt: skip

    def answer(self, request: shard_pb2.FormRequest) -> shard_pb2.FormResponse:
        """Start this worker's rank of a life, if it has not yet, and say whether it has failed.

        Raises:
            PhalanxError: STALE_EPOCH, when this worker has no rank in that epoch and life.
        """
        self._handle(LeaderStartedLife(request.replica, request.epoch, request.life, request.rendezvous))
        record, life = self._supervisor.record, (request.replica, request.epoch, request.life)
        if record is None or (record.replica, record.epoch, record.life) != life:
            message = (
                f"{self._worker} has no rank of {request.replica} in epoch {request.epoch}, "
                f"life {request.life}"
            )
            raise PhalanxError("STALE_EPOCH", message)
        if record.state is ShardState.FAILED:
            return shard_pb2.FormResponse(failed=True, reason=record.reason, permanent=record.permanent)
        return shard_pb2.FormResponse()
