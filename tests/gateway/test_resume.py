"""Gateways that die or leave: their clients resume at another gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import grpc
import pytest

import phalanx.client
from dataplane.gateway import checkpoint_plan
from dataplane.gateway.normalize import journal_for
from dataplane.gateway.resume import Ticket, format_cursor
from dataplane.gateway.server import InferenceService
from phalanx.cli.local.embedded_etcd import free_port
from phalanx.client import Client
from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import inference_pb2, inference_pb2_grpc
from tests.gateway import leader as leader_module
from tests.gateway.conftest import Rig, Running
from tests.gateway.leader import TestLeader, text_of, token
from tests.until import until

PROMPT = [5, 6, 7]


def expected(max_tokens: int, choice: int = 0) -> list[int]:
    return [token(PROMPT, 1, choice, position) for position in range(max_tokens)]


@pytest.fixture
async def second(rig: Rig) -> AsyncIterator[Running]:
    running = await Running.start("gateway-1", rig.store)
    yield running
    running.gateway.dispatcher.check_integrity()
    await running.kill()


async def reached(running: Running, leader: TestLeader) -> None:
    await until(lambda: running.gateway.dispatcher.router.connected.get(leader.replica) == leader.epoch)


async def collect(
    client: Client, at: int, hurt: Callable[[], Awaitable[object]], max_tokens: int = 20, n: int = 1
) -> list[list[int]]:
    """A request's tokens; `hurt` runs once, when every choice has `at` of them."""
    got: list[list[int]] = [[] for _ in range(n)]
    started = finished = 0
    hurting = None
    async for event in client.generate("demo", PROMPT, max_tokens=max_tokens, seed=1, n=n):
        started += event.HasField("started")
        finished += event.HasField("finished")
        if event.HasField("chunk"):
            assert event.chunk.index == len(got[event.chunk.choice]), "a token was repeated or skipped"
            got[event.chunk.choice] += event.chunk.token_ids
            assert event.chunk.text == "".join(map(text_of, event.chunk.token_ids))
        if hurting is None and min(map(len, got)) >= at:
            hurting = asyncio.ensure_future(hurt())
    assert hurting is not None
    await hurting
    assert (started, finished) == (1, 1)
    assert event.finished.usage.completion_tokens == sum(map(len, got))
    return got


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_goes_on_exactly_at_another_gateway(rig: Rig, second: Running, n: int) -> None:
    leader = await rig.add_leader("demo-0", hold_at=5)
    await reached(second, leader)

    async def die() -> None:
        await rig.first.kill()
        leader.release.set()

    async with Client(rig.first.address, second.address) as client:
        assert await collect(client, 5, die, n=n) == [expected(20, choice) for choice in range(n)]
    assert len(leader.submits) == 1, "the leader went on by itself"
    assert second.gateway.dispatcher.counters.resumed == 1
    await until(lambda: leader.acks)
    assert not leader.cancels


async def test_what_ran_on_while_nobody_listened_is_delivered_too(rig: Rig, second: Running) -> None:
    leader = await rig.add_leader("demo-0", hold_at=5)
    await reached(second, leader)
    stream = rig.client.generate("demo", PROMPT, max_tokens=20, seed=1)
    started = (await anext(stream)).started
    await rig.first.kill()
    leader.release.set()
    await until(lambda: leader.generated == 20)
    async with Client(second.address) as client:
        resumed = [event.event async for event in resume(client, started.resume_token, format_cursor((3,)))]
    assert [event.WhichOneof("event") for event in resumed] == ["started", "chunk", "finished"]
    assert resumed[1].chunk.index == 3
    assert list(resumed[1].chunk.token_ids) == expected(20)[3:]
    assert second.gateway.dispatcher.live == 0


async def test_gateway_and_leader_may_die_together(
    rig: Rig, second: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_plan, "AFTER_S", 0.0)
    monkeypatch.setattr(checkpoint_plan, "EVERY_TOKENS", 1)
    leader = await rig.add_leader("demo-0", hold_at=5)
    await reached(second, leader)

    async def die() -> None:
        writer = rig.gateway._checkpoints
        await until(lambda: any(part.tokens == 5 for part in writer._plan._written.values()))
        await rig.first.kill()
        await leader.kill()
        # In a real cluster the controller does this.
        again = await rig.add_leader("demo-0", wait=False)
        await reached(second, again)

    async with Client(rig.first.address, second.address) as client:
        assert await collect(client, 5, die) == [expected(20)]
    (replay,) = rig.leaders[1].submits
    assert list(replay.prior[0].token_ids) == expected(5)
    await until(lambda: not second.gateway._checkpoints._plan._written)


async def test_a_stream_that_died_with_all_who_held_it_is_sent_again_and_goes_on(
    rig: Rig, second: Running
) -> None:
    leader = await rig.add_leader("demo-0", hold_at=5)
    await reached(second, leader)

    async def die() -> None:
        await rig.first.kill()  # in its first second: there is no checkpoint
        await leader.kill()
        await reached(second, await rig.add_leader("demo-0", wait=False))

    async with Client(rig.first.address, second.address) as client:
        assert await collect(client, 5, die, n=2) == [expected(20, choice) for choice in range(2)]
    (again,) = rig.leaders[1].submits
    assert not any(choice.token_ids for choice in again.prior), "nothing of it was left"
    assert again.sampling.seed == 1
    assert second.gateway.dispatcher.live == 0


async def test_a_stream_that_takes_another_course_when_sent_again_is_not_continued(
    rig: Rig, second: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = await rig.add_leader("demo-0", hold_at=5)
    await reached(second, leader)

    async def die() -> None:
        await rig.first.kill()
        await leader.kill()
        monkeypatch.setattr(leader_module, "token", lambda *_: 77)
        await reached(second, await rig.add_leader("demo-0", wait=False))

    async with Client(rig.first.address, second.address) as client:
        with pytest.raises(PhalanxError, match="other tokens") as caught:
            await collect(client, 5, die)
    assert caught.value.reason == "UNKNOWN_REQUEST"
    await until(lambda: second.gateway.dispatcher.live == 0)


async def test_a_new_request_waits_for_a_gateway_that_comes_back(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.add_leader("demo-0")
    refused = 0

    def to_error(error: grpc.aio.AioRpcError) -> PhalanxError:
        nonlocal refused
        refused += 1
        return original(error)

    original = rpc.to_error
    monkeypatch.setattr(rpc, "to_error", to_error)
    address = f"127.0.0.1:{free_port()}"
    async with Client(address) as client:
        stream = client.generate("demo", PROMPT, max_tokens=5, seed=1)
        first = asyncio.ensure_future(anext(stream))
        await until(lambda: refused == 2)
        server = rpc.server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceService(rig.gateway), server)
        rpc.bind(server, address)
        await server.start()
        assert (await first).HasField("started")
        assert [id async for event in stream for id in event.chunk.token_ids] == expected(5)
        await server.stop(None)


async def test_a_client_may_have_seen_more_than_the_checkpoint(
    rig: Rig, second: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_plan, "AFTER_S", 0.0)
    leader = await rig.add_leader("demo-0", hold_at=5)
    stream = rig.client.generate("demo", PROMPT, max_tokens=20, seed=1)
    started = (await anext(stream)).started
    writer = rig.gateway._checkpoints
    await until(lambda: writer._plan._written)
    await rig.first.kill()
    await leader.kill()
    await reached(second, await rig.add_leader("demo-0", wait=False))
    async with Client(second.address) as client:
        rest = [event.event async for event in resume(client, started.resume_token, format_cursor((9,)))]
    ids = [id for event in rest for id in event.chunk.token_ids]
    assert ids == expected(20)[9:]


async def test_nobody_knows_a_request_that_is_over(rig: Rig, second: Running) -> None:
    leader = await rig.add_leader("demo-0")
    await reached(second, leader)
    events = [event async for event in rig.client.generate("demo", PROMPT, max_tokens=3, seed=1)]
    await until(lambda: leader.acks)
    leader.pass_time(60.0)
    async with Client(second.address) as client:
        with pytest.raises(PhalanxError) as caught:
            async for _ in resume(client, events[0].started.resume_token, ""):
                pass
    assert caught.value.reason == "UNKNOWN_REQUEST"
    assert not caught.value.retryable


async def test_what_was_written_may_not_have_come_and_can_be_asked_for_again(
    rig: Rig, second: Running
) -> None:
    leader = await rig.add_leader("demo-0")
    await reached(second, leader)
    started, *_ = [event async for event in rig.client.generate("demo", PROMPT, max_tokens=3, seed=1)]
    await until(lambda: leader.acks)
    async with Client(second.address) as client:
        again = [
            event.event async for event in resume(client, started.started.resume_token, format_cursor((1,)))
        ]
    assert [id for event in again for id in event.chunk.token_ids] == expected(3)[1:]


async def test_while_a_replica_has_not_answered_a_request_is_not_known_to_be_over(rig: Rig) -> None:
    await rig.add_leader("demo-0")
    silent = await rig.add_leader("demo-1", answers_attach=False)

    async def die() -> None:
        await until(lambda: silent.attaches)
        await silent.kill()

    async with asyncio.TaskGroup() as group:
        group.create_task(die())
        with pytest.raises(PhalanxError) as caught:
            async for _ in resume(rig.client, "0" * 32 + ".1.demo", ""):
                pass
    assert (caught.value.reason, caught.value.retryable) == ("UNREACHABLE", True)
    with pytest.raises(PhalanxError) as caught:
        async for _ in resume(rig.client, "0" * 32 + ".1.demo", ""):
            pass
    assert (caught.value.reason, caught.value.retryable) == ("UNKNOWN_REQUEST", False)


@pytest.mark.parametrize(
    ("token", "cursor"), [("x", ""), ("0" * 32 + ".2.demo", format_cursor((1,))), ("0" * 32 + ".1.demo", "1")]
)
async def test_what_is_no_token_or_no_cursor_is_refused(rig: Rig, token: str, cursor: str) -> None:
    with pytest.raises(PhalanxError) as caught:
        async for _ in resume(rig.client, token, cursor):
            pass
    assert caught.value.reason == "INVALID_ARGUMENT"


async def test_a_client_that_comes_back_to_its_gateway_takes_its_stream_over(rig: Rig) -> None:
    leader = await rig.add_leader("demo-0", hold_at=5)
    stream = rig.client.generate("demo", PROMPT, max_tokens=20, seed=1)
    event = await anext(stream)
    token = event.started.resume_token
    again = resume(rig.client, token, format_cursor((2,)))
    assert (await anext(again)).event.HasField("started")
    with pytest.raises(PhalanxError) as caught:
        async for _ in stream:
            pass
    assert caught.value.reason == "TAKEN_OVER"
    leader.release.set()
    ids = [id async for event in again for id in event.event.chunk.token_ids]
    assert ids == expected(20)[2:]
    assert not leader.cancels
    assert not rig.gateway._live_requests


async def test_a_gateway_that_leaves_sends_its_clients_to_another(rig: Rig, second: Running) -> None:
    leader = await rig.add_leader("demo-0", hold_at=5)
    await reached(second, leader)

    async def leave() -> None:
        await rig.gateway.drain(0.0)
        leader.release.set()

    async with Client(rig.first.address, second.address) as client:
        assert await collect(client, 5, leave) == [expected(20)]
        assert not leader.cancels
        # And new requests find the other one by themselves.
        events = [event async for event in client.generate("demo", PROMPT, max_tokens=4, seed=1)]
        assert events[-1].finished.usage.completion_tokens == 4


async def test_a_gateway_that_leaves_does_not_cancel_a_request_that_it_still_finds(
    rig: Rig, second: Running
) -> None:
    leader = await rig.add_leader("demo-0", hold_at=5, answers_attach=False)
    await reached(second, leader)
    started = (await anext(rig.client.generate("demo", PROMPT, max_tokens=20, seed=1))).started
    await rig.first.kill()

    async def search() -> None:
        async with second.gateway.resume(Ticket.parse(started.resume_token)):
            raise AssertionError("the leader has not answered")

    client = asyncio.create_task(search())
    await until(lambda: leader.attaches)
    await second.gateway.drain(0.0)
    client.cancel()
    await asyncio.wait([client])
    leader.answer_attach()
    await until(lambda: second.gateway.dispatcher.counters.resumed)
    assert second.gateway.dispatcher.live == 1, "it goes on at the replica, for another gateway"


async def test_a_gateway_that_leaves_lets_its_clients_finish(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phalanx.client, "BEGIN_WITHIN_S", 0.0)
    leader = await rig.add_leader("demo-0", hold_at=5)
    assert [event async for event in rig.client.generate("demo", PROMPT, max_tokens=2, seed=1)]  # idle, once
    draining: list[asyncio.Task[None]] = []

    async def leave() -> None:
        draining.append(asyncio.create_task(rig.gateway.drain(20.0)))
        await asyncio.sleep(0)
        with pytest.raises(PhalanxError) as caught:
            async for _ in rig.client.generate("demo", PROMPT):
                pass
        assert (caught.value.reason, caught.value.retryable) == ("UNREACHABLE", True)
        leader.release.set()

    assert await collect(rig.client, 5, leave) == [expected(20)]
    await draining[0]


async def test_an_event_source_goes_on_by_http(rig: Rig, second: Running) -> None:
    leader = await rig.add_leader("demo-0", hold_at=5)
    await reached(second, leader)
    body = {
        "model": "demo", "prompt": PROMPT, "max_tokens": 20, "seed": 1, "stream": True, "logprobs": 1,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    texts, last_id, events = [], "", []
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{rig.url}/v1/completions", json=body) as response:
            path = f"/v1/requests/{response.headers['x-phalanx-resume-token']}/stream"
            async for id, data in server_sent(response):
                last_id = id
                events.append(json.loads(data))
                if sum(len(choice["text"].split()) for event in events for choice in event["choices"]) == 5:
                    break
        await rig.first.kill()
        leader.release.set()
        async with http.get(second.url + path, headers={"last-event-id": last_id}) as response:
            assert response.status == 200
            async for _, data in server_sent(response):
                if data != "[DONE]":
                    events.append(json.loads(data))
            assert data == "[DONE]"
        async with http.get(f"{second.url}/v1/requests/nonsense/stream") as response:
            assert response.status == 400
        await until(lambda: leader.acks)
        leader.pass_time(60.0)
        async with http.get(second.url + path) as response:
            assert response.status == 404, "it has been delivered"
    texts = [choice["text"] for event in events for choice in event["choices"]]
    assert "".join(texts) == "".join(map(text_of, expected(20)))
    offsets = [
        at for event in events for choice in event["choices"] for at in choice["logprobs"]["text_offset"]
    ]
    assert offsets == [len("".join(map(text_of, expected(20)[:i]))) for i in range(20)]
    assert events[-1]["usage"]["completion_tokens"] == 20
    assert len({event["id"] for event in events}) == 1


async def server_sent(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, str]]:
    id = ""
    async for line in response.content:
        name, _, value = line.decode().strip().partition(": ")
        if name == "id":
            id = value
        elif name == "data":
            yield id, value


async def resume(client: Client, token: str, cursor: str) -> AsyncIterator[inference_pb2.ResumeResponse]:
    call = client._stubs[0].Resume(inference_pb2.ResumeRequest(resume_token=token, cursor=cursor))
    try:
        async for event in call:
            yield event
    except grpc.aio.AioRpcError as error:
        raise rpc.to_error(error) from error
    finally:
        call.cancel()


async def test_a_gateway_may_keep_nothing(rig: Rig) -> None:
    leader = await rig.add_leader("demo-0")
    rig.gateway._resumable = False
    started, *_ = [event async for event in rig.client.generate("demo", PROMPT, max_tokens=3, seed=1)]
    assert started.started.resume_token == ""
    assert leader.submits[0].resume_key == ""
    assert not leader.acks


async def test_a_resumed_request_does_not_displace_another_of_its_id(rig: Rig, second: Running) -> None:
    leader = await rig.add_leader("demo-0", hold_at=5)
    await reached(second, leader)
    stream = rig.client.stream(inference_pb2.GenerateRequest(request_id="mine", model="demo", text="x"))
    started = (await anext(stream)).started
    await rig.first.kill()
    leader.release.set()
    async with second.gateway.request(
        journal_for(inference_pb2.GenerateRequest(request_id="mine", model="demo", text="y"))
    ) as other:
        await until(lambda: other.journal.closed)
        async with Client(second.address) as client:
            with pytest.raises(PhalanxError) as caught:
                async for _ in resume(client, started.resume_token, ""):
                    pass
        assert caught.value.reason == "DUPLICATE_REQUEST"
        assert second.gateway._live_requests["mine"] is other


async def test_a_stream_without_a_token_is_never_begun_again(rig: Rig, second: Running) -> None:
    leader = await rig.add_leader("demo-0", hold_at=5)
    await reached(second, leader)
    rig.gateway._resumable = False
    ids: list[int] = []
    killing: list[asyncio.Future[None]] = []

    async def stream(client: Client) -> None:
        async for event in client.generate("demo", PROMPT, max_tokens=20, seed=1):
            ids.extend(event.chunk.token_ids)
            if len(ids) == 5:
                killing.append(asyncio.ensure_future(rig.first.kill()))

    async with Client(rig.first.address, second.address) as client:
        with pytest.raises(PhalanxError) as caught:
            await stream(client)
    await killing[0]
    assert caught.value.reason == "UNREACHABLE"
    assert ids == expected(5)
    assert len(leader.submits) == 1


async def test_a_token_that_was_tampered_with_harms_no_stream(rig: Rig) -> None:
    leader = await rig.add_leader("demo-0", hold_at=5)
    stream = rig.client.generate("demo", PROMPT, max_tokens=20, seed=1)
    key, _, rest = (await anext(stream)).started.resume_token.split(".", 2)
    with pytest.raises(PhalanxError) as caught:
        async for _ in resume(rig.client, f"{key}.2.{rest}", ""):
            pass
    assert caught.value.reason == "INVALID_ARGUMENT"
    leader.release.set()
    assert [id async for event in stream for id in event.chunk.token_ids] == expected(20)
