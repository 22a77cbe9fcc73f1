"""Draining: a worker that leaves first waits until its replica has no requests.

Requests that remain at the end of its drain time are replayed on other replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dataplane.shard import peers
from dataplane.shard.supervisor import ShardSupervisor
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.store.records import ShardRecord, ShardState

_UNROUTABLE_S = 0.5  # until every gateway knows that this worker drains
_TICK_S = 0.1
_MAX_UNANSWERED = 5  # questions in a row

Pending = Callable[[shard_pb2.PendingRequest], shard_pb2.PendingResponse]


async def until_unneeded(supervisor: ShardSupervisor, record: ShardRecord, pending: Pending) -> None:
    """Return when the replica of `record` has ended or has no requests.

    Args:
        supervisor: knows this worker's rank.
        record: this worker's status when draining began.
        pending: answers for a replica that this worker leads. Raises PhalanxError.
    """
    await asyncio.sleep(_UNROUTABLE_S)
    request, failures = shard_pb2.PendingRequest(replica=record.replica, epoch=record.epoch), 0
    while True:
        current = supervisor.record
        if current is None or (current.epoch, current.state) != (record.epoch, ShardState.READY):
            return
        try:
            if record.rank == 0:
                requests = pending(request).requests
            else:
                requests = await peers.ask_pending(supervisor.leader_address, request)
            if not requests:
                return
            failures = 0
        except PhalanxError as error:
            # NOT_LEADER and STALE_EPOCH: the replica has ended. A leader without an answer is busy or gone.
            failures += 1
            if error.reason in ("NOT_LEADER", "STALE_EPOCH") or failures == _MAX_UNANSWERED:
                return
        await asyncio.sleep(_TICK_S)
