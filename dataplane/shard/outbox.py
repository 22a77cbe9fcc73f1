"""Frames that a leader has not yet written to one gateway."""

from __future__ import annotations

import asyncio
from collections import deque

from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError

MAX_FRAMES = 1024


class Outbox:
    """A bounded queue of frames, emptied by one writer. A gateway that reads too slowly loses its stream.

    Owns: frames not yet written; the error with which the stream ends.
    Does not own: the stream (`server`), requests (`requests`).
    """

    def __init__(self) -> None:
        self._frames: deque[shard_pb2.StepFrame] = deque()
        self._changed = asyncio.Event()
        self._closed = False
        self.error: PhalanxError | None = None

    def put(self, frame: shard_pb2.StepFrame) -> bool:
        """Queue a frame. Returns False when there is no room; the outbox is then closed and empty."""
        if self._closed:
            return True
        if len(self._frames) >= MAX_FRAMES:
            self._frames.clear()
            self.close(PhalanxError("OVERLOADED", f"the gateway left {MAX_FRAMES} frames unread"))
            return False
        self._frames.append(frame)
        self._changed.set()
        return True

    def close(self, error: PhalanxError | None = None) -> None:
        """Let the writer write the queued frames, then end the stream. The first call's error is kept."""
        if not self._closed:
            self._closed, self.error = True, error
            self._changed.set()

    async def get(self) -> shard_pb2.StepFrame | None:
        """The next frame; None at the end of the stream."""
        while not self._frames:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._frames.popleft()
