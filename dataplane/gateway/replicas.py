"""The open replica streams: one per ready replica, opened again whenever it breaks.

Owns: which streams are open, and the tasks that keep them open.
Does not own: which streams should be open (`router.targets`), the meaning of frames (`dispatcher`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from functools import partial

from dataplane.gateway.replica_stream import ReplicaStream
from dataplane.gateway.router import Target
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError

log = logging.getLogger(__name__)
_RECONNECT_S = (0.05, 0.5)
"""The shortest and the longest pause before a stream is opened again."""


class ReplicaStreams:
    """The streams of one gateway.

    Args:
        gateway: the gateway's name.
        incarnation: the gateway's incarnation.
        on_up: is called when a leader has answered.
        on_frame: is called with each frame.
        on_down: is called when a stream has ended, with the reason and whether a request may be the cause.
    """

    def __init__(
        self,
        gateway: str,
        incarnation: str,
        on_up: Callable[[Target, shard_pb2.LeaderHello], None],
        on_frame: Callable[[Target, shard_pb2.StepFrame], None],
        on_down: Callable[[Target, str, bool], None],
    ) -> None:
        self._gateway, self._incarnation = gateway, incarnation
        self._on_up, self._on_frame, self._on_down = on_up, on_frame, on_down
        self._open: dict[Target, ReplicaStream] = {}
        self._keepers: dict[Target, asyncio.Task[None]] = {}
        self._ending: dict[Target, asyncio.Task[None]] = {}  # cancelled keepers that have not ended yet

    def send(self, target: Target, request: shard_pb2.ServeRequest) -> None:
        """Queue a request on an open stream. It is dropped if the stream breaks before."""
        self._open[target].send(request)

    def send_if_open(self, target: Target, request: shard_pb2.ServeRequest) -> None:
        """Like `send`, but do nothing if the stream is not open."""
        if stream := self._open.get(target):
            stream.send(request)

    def close(self, target: Target, reason: str) -> None:
        """Close a stream, if it is open. It is opened again while the topology wants it."""
        if stream := self._open.get(target):
            stream.close(reason)

    def keep(self, wanted: set[Target], group: asyncio.TaskGroup) -> None:
        """Keep exactly these streams open from now on. Their tasks run in `group`."""
        for target in self._keepers.keys() - wanted:
            keeper = self._keepers.pop(target)
            keeper.cancel()
            # A keeper that still waits for an earlier one has opened nothing: the earlier one stays listed.
            if target not in self._ending:
                self._ending[target] = keeper
                keeper.add_done_callback(self._forget)
        for target in wanted - self._keepers.keys():
            previous = self._ending.get(target)
            self._keepers[target] = group.create_task(self._keep_open(target, previous))

    def _forget(self, done: asyncio.Task[None]) -> None:
        self._ending = {target: keeper for target, keeper in self._ending.items() if keeper is not done}

    async def _keep_open(self, target: Target, previous: asyncio.Task[None] | None) -> None:
        """Open the stream again whenever it breaks, until cancelled.

        One keeper per target at a time: wait for the end of the `previous` one first.
        """
        if previous is not None:
            await asyncio.wait([previous])
        pause = _RECONNECT_S[0]
        while True:
            opened = time.monotonic()
            await self._run_once(target)
            pause = _RECONNECT_S[0] if time.monotonic() - opened > _RECONNECT_S[1] else pause * 2
            await asyncio.sleep(random.uniform(0, min(pause, _RECONNECT_S[1])))

    async def _run_once(self, target: Target) -> None:
        """Open the stream and read it until it ends."""
        hello = shard_pb2.GatewayHello(
            gateway=self._gateway, incarnation=self._incarnation, replica=target.replica, epoch=target.epoch
        )
        stream = self._open[target] = ReplicaStream(target, hello)
        # The values for a cancelled task; every other end replaces them.
        reason, blame = PhalanxError("UNREACHABLE", "the replica has left the topology"), False
        try:
            reason = await stream.run(partial(self._on_up, target), partial(self._on_frame, target))
            blame = True
        except Exception:
            # A bug that one stream's frame triggers must not end the other streams.
            log.exception("stream failed", extra={"replica": target.replica})
            reason, blame = PhalanxError("INTERNAL", "the gateway failed on a frame"), True
        finally:
            del self._open[target]
            log.info(
                "stream ended",
                extra={"replica": target.replica, "epoch": target.epoch, "reason": reason.message},
            )
            self._on_down(target, reason.message, blame)
