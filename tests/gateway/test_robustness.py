"""One bad request, frame, record or moment must not harm the other requests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dataplane.gateway.gateway import Gateway
from dataplane.gateway.normalize import journal_for
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.store.interface import Put
from phalanx.store.memory import MemoryStore
from phalanx.store.records import GatewayRecord, ShardRecord, ShardState, encode
from phalanx.store.registration import Registration
from phalanx.v1 import inference_pb2
from tests.gateway.conftest import KEYS, Rig
from tests.until import until


def request(request_id: str, max_tokens: int = 6) -> inference_pb2.GenerateRequest:
    generate = inference_pb2.GenerateRequest(request_id=request_id, model="demo", text="hi")
    generate.stopping.max_tokens = max_tokens
    return generate


async def tokens_of(rig: Rig, generate: inference_pb2.GenerateRequest) -> int:
    return sum([len(event.chunk.token_ids) async for event in rig.client.stream(generate)])


async def test_an_id_can_be_used_again_after_its_client_has_left(rig: Rig) -> None:
    leader = await rig.add_leader("demo-0", hold_at=2)
    stream = rig.client.stream(request("x"))
    await anext(stream)
    await stream.aclose()
    await until(lambda: leader.cancels)
    leader.release.set()
    assert await tokens_of(rig, request("x")) == 6
    first, second = leader.submits
    assert first.attempt != second.attempt


async def test_an_id_is_taken_while_its_client_still_reads(rig: Rig) -> None:
    await rig.add_leader("demo-0")
    async with rig.gateway.request(journal_for(request("x"))) as slow:
        await until(lambda: slow.journal.closed)
        with pytest.raises(PhalanxError) as caught:
            async with rig.gateway.request(journal_for(request("x"))):
                pass
        assert caught.value.reason == "DUPLICATE_REQUEST"
        assert sum([len(chunk.token_ids) async for chunk in slow.chunks()]) == 6


async def test_a_target_that_leaves_and_comes_back_at_once_has_a_stream(rig: Rig) -> None:
    leader = await rig.add_leader("demo-0")
    for state in (ShardState.STARTING, ShardState.READY):
        record = ShardRecord("demo-0", 0, leader.epoch, "w", "i", state)
        await rig.store.txn([], [Put(KEYS.shard("demo-0", 0), encode(record))])
    await until(lambda: rig.gateway.snapshot.shards["demo-0", 0].state is ShardState.READY)
    for number in range(3):
        assert await tokens_of(rig, request(f"r{number}")) == 6


async def test_a_bug_met_on_a_frame_ends_one_stream_not_the_gateway(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.add_leader("demo-0")
    frame, broken = rig.gateway.dispatcher.frame, []

    def break_once(*arguments: Any) -> Any:
        if not broken:
            broken.append(True)
            raise ZeroDivisionError
        return frame(*arguments)

    monkeypatch.setattr(
        type(rig.gateway.dispatcher), "frame", lambda self, *arguments: break_once(*arguments)
    )
    assert await tokens_of(rig, request("x")) == 6
    assert broken


async def test_a_bug_met_by_one_request_of_a_conversation_spares_the_others(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = await rig.add_leader("demo-0", hold_at=2)
    call = rig.client._stubs[0].Converse()
    await call.write(inference_pb2.ConverseRequest(generate=request("good")))
    await until(lambda: leader.submits)
    monkeypatch.setattr("dataplane.gateway.server.journal_for", lambda asked: 1 / 0)
    await call.write(inference_pb2.ConverseRequest(generate=request("bad")))
    first_bad = asyncio.Event()
    ends = {}

    async def read() -> None:
        async for response in call:
            if response.HasField("error"):
                ends[response.request_id] = response.error.reason
                first_bad.set()
            elif response.event.HasField("finished"):
                ends[response.request_id] = "finished"

    reader = asyncio.create_task(read())
    await first_bad.wait()
    leader.release.set()
    await call.done_writing()
    await reader
    assert ends == {"bad": "INTERNAL", "good": "finished"}


async def test_before_the_first_view_a_model_is_not_unknown_but_unavailable() -> None:
    gateway = Gateway("g", "boot", MemoryStore(), KEYS)
    with pytest.raises(PhalanxError) as caught:
        async with gateway.request(journal_for(request("x"))):
            pass
    assert caught.value.reason == "STORE_UNAVAILABLE"
    assert caught.value.retryable


async def test_a_registration_that_is_stopped_stays_away() -> None:
    store = MemoryStore()
    registration = Registration(store, KEYS, GatewayRecord("g", "i", "h", "a", "u", 1))
    running = asyncio.create_task(registration.run())
    async for change in store.watch(KEYS.gateway("g")):
        if change.listing.entries:
            break
    running.cancel()
    await asyncio.wait([running])
    await registration.close()
    assert await store.get(KEYS.gateway("g")) is None


async def test_a_clients_own_deadline_is_told_as_one(rig: Rig) -> None:
    await rig.add_leader("demo-0", hold_at=0)
    with pytest.raises(PhalanxError) as caught:
        async for _ in rig.client.stream(request("x"), timeout_s=0.2):
            pass
    assert caught.value.reason == "DEADLINE_EXCEEDED"


async def test_a_frame_of_another_epoch_is_dropped(rig: Rig) -> None:
    leader = await rig.add_leader("demo-0", hold_at=1)
    stream = rig.client.stream(request("x", 3))
    async for event in stream:
        if event.HasField("chunk"):
            break
    (submit,) = leader.submits
    stale = shard_pb2.StepFrame(replica="demo-0", epoch=leader.epoch - 1)
    stale.deltas.add(request_id="x", attempt=submit.attempt, index=1, token_ids=[666], pieces=["!"])
    leader.inject(stale)
    await until(lambda: rig.gateway.dispatcher.counters.stale_frames_dropped == 1)
    leader.release.set()
    rest = [token async for event in stream for token in event.chunk.token_ids]
    assert len(rest) == 2
    assert 666 not in rest
