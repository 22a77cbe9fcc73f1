"""A real gateway and leaders that die: what the client sees."""

from __future__ import annotations

import asyncio

import pytest

from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import inference_pb2, types_pb2
from tests.gateway.conftest import Rig
from tests.gateway.leader import text_of, token
from tests.until import until

PROMPT = [5, 6, 7]


def expected(max_tokens: int, seed: int = 1, choice: int = 0) -> list[int]:
    return [token(PROMPT, seed, choice, position) for position in range(max_tokens)]


async def test_a_stream_goes_on_exactly_on_another_replica(rig: Rig) -> None:
    first = await rig.add_leader("demo-0", hold_at=5)
    ids: list[int] = []
    text = ""
    async for event in rig.client.generate("demo", PROMPT, max_tokens=20, seed=1):
        if event.HasField("chunk"):
            assert event.chunk.index == len(ids)
            ids += event.chunk.token_ids
            text += event.chunk.text
            if len(ids) == 5 and len(rig.leaders) == 1:
                second = await rig.add_leader("demo-1")
                await first.kill()
        last = event
    assert ids == expected(20)
    assert text == "".join(map(text_of, ids))
    assert last.finished.usage == types_pb2.Usage(prompt_tokens=3, completion_tokens=20)
    (replay,) = second.submits
    assert list(replay.token_ids.ids) == PROMPT
    assert list(replay.prior[0].token_ids) == expected(5)
    assert rig.gateway.dispatcher.counters.failovers == 1


async def test_a_stream_waits_for_its_only_replica_to_come_back(rig: Rig) -> None:
    first = await rig.add_leader("demo-0", hold_at=3)
    ids: list[int] = []
    async for event in rig.client.generate("demo", PROMPT, max_tokens=10, seed=1):
        ids += event.chunk.token_ids
        if len(ids) == 3 and len(rig.leaders) == 1:
            await first.kill()
            await until(lambda: not rig.gateway.dispatcher.router.routes)
            await rig.add_leader("demo-0")
    assert ids == expected(10)


async def test_every_choice_of_a_request_survives(rig: Rig) -> None:
    first = await rig.add_leader("demo-0", hold_at=4)
    request = inference_pb2.GenerateRequest(model="demo", n=3)
    request.token_ids.ids[:] = PROMPT
    request.sampling.seed = 1
    request.stopping.max_tokens = 9
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}
    async for event in rig.client.stream(request):
        got[event.chunk.choice] += event.chunk.token_ids
        if all(len(ids) == 4 for ids in got.values()) and len(rig.leaders) == 1:
            await rig.add_leader("demo-1")
            await first.kill()
    assert got == {choice: expected(9, choice=choice) for choice in range(3)}


async def test_a_client_that_leaves_cancels_its_attempt(rig: Rig) -> None:
    leader = await rig.add_leader("demo-0", hold_at=2)
    stream = rig.client.generate("demo", PROMPT, max_tokens=10)
    async for event in stream:
        if event.HasField("chunk"):
            break
    await stream.aclose()
    await until(lambda: leader.cancels)
    assert rig.gateway.dispatcher.live == 0


async def test_a_deadline_ends_a_request_with_a_typed_error(rig: Rig) -> None:
    await rig.add_leader("demo-0", hold_at=0)
    with pytest.raises(PhalanxError) as caught:
        async for _ in rig.client.generate("demo", PROMPT, max_tokens=10, timeout_s=0.3):
            pass
    assert caught.value.reason == "DEADLINE_EXCEEDED"


async def test_cancel_by_id_ends_a_request_from_outside(rig: Rig) -> None:
    leader = await rig.add_leader("demo-0", hold_at=2)
    request = inference_pb2.GenerateRequest(request_id="mine", model="demo", text="x")
    stream = rig.client.stream(request)
    async for event in stream:
        if event.HasField("chunk"):
            break
    assert rig.gateway.cancel("mine")
    with pytest.raises(PhalanxError) as caught:
        async for _ in stream:
            pass
    assert caught.value.reason == "CANCELLED"
    await until(lambda: leader.cancels)


async def test_converse_carries_many_requests_and_their_errors(rig: Rig) -> None:
    await rig.add_leader("demo-0")
    call = rig.client._stubs[0].Converse()
    for number in range(3):
        generate = inference_pb2.GenerateRequest(request_id=f"c{number}", model="demo")
        generate.token_ids.ids[:] = PROMPT
        generate.sampling.seed = number
        generate.stopping.max_tokens = 6
        await call.write(inference_pb2.ConverseRequest(generate=generate))
    unknown = inference_pb2.GenerateRequest(request_id="bad", model="nobody", text="x")
    await call.write(inference_pb2.ConverseRequest(generate=unknown))
    await call.done_writing()
    ids: dict[str, list[int]] = {}
    errors = {}
    async for response in call:
        if response.HasField("error"):
            errors[response.request_id] = response.error.reason
        else:
            ids.setdefault(response.request_id, []).extend(response.event.chunk.token_ids)
    assert ids == {f"c{number}": expected(6, seed=number) for number in range(3)}
    assert errors == {"bad": "UNKNOWN_MODEL"}


async def test_converse_cancels_one_request_and_leaves_the_others(rig: Rig) -> None:
    leader = await rig.add_leader("demo-0", hold_at=2)
    call = rig.client._stubs[0].Converse()
    for name in ("kept", "left"):
        generate = inference_pb2.GenerateRequest(request_id=name, model="demo", text="x")
        await call.write(inference_pb2.ConverseRequest(generate=generate))
    await until(lambda: len(leader.submits) == 2)
    await call.write(inference_pb2.ConverseRequest(cancel=inference_pb2.CancelRequest(request_id="left")))
    await until(lambda: leader.cancels)
    leader.release.set()
    await call.done_writing()
    ends = {}
    async for response in call:
        if response.HasField("error"):
            ends[response.request_id] = response.error.reason
        elif response.event.HasField("finished"):
            ends[response.request_id] = "finished"
    assert ends == {"kept": "finished", "left": "CANCELLED"}


async def test_a_slow_client_holds_up_nobody(rig: Rig) -> None:
    await rig.add_leader("demo-0")
    slow = rig.client.generate("demo", PROMPT, max_tokens=2000, seed=1)
    ids: list[int] = []
    async for event in slow:
        ids += event.chunk.token_ids
        if ids:
            break  # stops reading, stays connected
    async with asyncio.timeout(20):
        quick = [event async for event in rig.client.generate("demo", PROMPT, max_tokens=50, seed=2)]
    assert sum(len(event.chunk.token_ids) for event in quick) == 50
    async for event in slow:
        ids += event.chunk.token_ids
    assert ids == expected(2000)
