"""The single reader of a live request."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from dataplane.gateway.journal import Journal
from dataplane.gateway.live import LiveRequest
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError


def live_request() -> LiveRequest:
    return LiveRequest(Journal("demo", shard_pb2.Submit(request_id="r", n=1)), opened=0.0)


async def displaced(live: LiveRequest, why: PhalanxError | None = None) -> PhalanxError:
    """The error of a reader that waits for a token and is displaced."""
    reader = asyncio.ensure_future(anext(live.chunks()))
    await asyncio.sleep(0)
    live.displace_reader(why)
    with pytest.raises(PhalanxError) as caught:
        await reader
    return caught.value


async def test_a_displaced_reader_gets_the_reason() -> None:
    live = live_request()
    assert (await displaced(live)).reason == "TAKEN_OVER"
    leaving = PhalanxError("UNREACHABLE", "this gateway shuts down")
    assert await displaced(live, leaving) is leaving
    assert (await displaced(live)).reason == "TAKEN_OVER"


async def test_a_displaced_reader_leaves_no_journal_behind() -> None:
    live = live_request()
    journal = weakref.ref(live.journal)
    await displaced(live)
    del live
    gc.collect()
    await asyncio.sleep(0)  # asyncio closes the reader's generator
    gc.collect()
    assert journal() is None
