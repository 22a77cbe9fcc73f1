"""What a leader has yet to write to one gateway."""

from __future__ import annotations

import asyncio
from collections import deque

from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError

MAX_FRAMES = 1024


class Outbox:
    """A bounded queue with one writer behind it. A gateway that reads too slowly loses its stream.

    Owns: frames not yet written, why the stream ends.
    Does not own: the stream (`server`), whose requests these are (`requests`).
    """

    def __init__(self) -> None:
        self._frames: deque[shard_pb2.StepFrame] = deque()
        self._news = asyncio.Event()
        self._closed = False
        self.error: PhalanxError | None = None

    def put(self, frame: shard_pb2.StepFrame) -> bool:
        """Queue a frame; False when there is no room: the outbox is then closed and empty."""
        if self._closed:
            return True
        if len(self._frames) >= MAX_FRAMES:
            self._frames.clear()
            self.close(PhalanxError("OVERLOADED", f"the gateway left {MAX_FRAMES} frames unread"))
            return False
        self._frames.append(frame)
        self._news.set()
        return True

    def close(self, error: PhalanxError | None = None) -> None:
        """Write what is queued, then end the stream. The first reason stays."""
        if not self._closed:
            self._closed, self.error = True, error
            self._news.set()

    async def get(self) -> shard_pb2.StepFrame | None:
        """The next frame, or None when the stream is to end."""
        while not self._frames:
            if self._closed:
                return None
            self._news.clear()
            await self._news.wait()
        return self._frames.popleft()
