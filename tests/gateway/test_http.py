"""The OpenAI-compatible API of a real gateway."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from dataplane.gateway.resume import format_cursor
from tests.gateway.conftest import Rig
from tests.gateway.leader import text_of, token
from tests.until import until

PROMPT = [5, 6, 7]
IDS = [token(PROMPT, 1, 0, position) for position in range(8)]
BODY: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 8, "seed": 1}


async def events(response: aiohttp.ClientResponse) -> list[tuple[str, Any]]:
    """(id, data) of every server-sent event."""
    found = []
    for block in (await response.text()).strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((lines["id"], lines["data"] if lines["data"] == "[DONE]" else json.loads(lines["data"])))
    return found


async def test_a_completion_in_one_piece(rig: Rig, http: aiohttp.ClientSession) -> None:
    await rig.add_leader("demo-0")
    async with http.post("/v1/completions", json=BODY | {"return_token_ids": True}) as response:
        body = await response.json()
    (choice,) = body["choices"]
    assert choice["token_ids"] == IDS
    assert choice["text"] == "".join(map(text_of, IDS))
    assert choice["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    assert body["object"] == "text_completion"
    assert response.headers["x-phalanx-replica"] == "demo-0"


async def test_a_stream_of_events_carries_cursors_and_usage(rig: Rig, http: aiohttp.ClientSession) -> None:
    await rig.add_leader("demo-0")
    wants = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    async with http.post("/v1/completions", json=BODY | wants) as response:
        got = await events(response)
    *chunks, (_, last), (end, done) = got
    ids: list[int] = []
    for cursor, chunk in chunks:
        ids += chunk["choices"][0]["token_ids"]
        finished = chunk["choices"][0]["finish_reason"] is not None
        assert cursor == format_cursor((len(ids) + finished,))
    assert ids == IDS
    assert last["usage"]["completion_tokens"] == 8
    assert (end, done) == (format_cursor((9,)), "[DONE]")


async def test_usage_is_right_after_a_failover(rig: Rig, http: aiohttp.ClientSession) -> None:
    first = await rig.add_leader("demo-0", hold_at=4)
    await rig.add_leader("demo-1")

    async def kill_once_it_generates() -> None:
        await until(lambda: first.submits)
        await until(lambda: sum(live.journal.tokens for live in rig.gateway._live_requests.values()) == 4)
        await first.kill()

    async with asyncio.TaskGroup() as group:
        group.create_task(kill_once_it_generates())
        async with http.post("/v1/completions", json=BODY | {"return_token_ids": True}) as response:
            body = await response.json()
    assert body["choices"][0]["token_ids"] == IDS
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}


async def test_chat_streams_deltas(rig: Rig, http: aiohttp.ClientSession) -> None:
    await rig.add_leader("demo-0")
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 4,
        "seed": 1,
    }
    async with http.post("/v1/chat/completions", json=body | {"stream": True}) as response:
        got = await events(response)
    deltas = [data["choices"][0]["delta"] for _, data in got[:-1]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta["content"] for delta in deltas) == "".join(
        text_of(token([2], 1, 0, i)) for i in range(4)
    )
    async with http.post("/v1/chat/completions", json=body) as response:
        whole = await response.json()
    assert whole["choices"][0]["message"]["content"] == "".join(delta["content"] for delta in deltas)


async def test_logprobs_have_a_place_for_every_token(rig: Rig, http: aiohttp.ClientSession) -> None:
    await rig.add_leader("demo-0")
    async with http.post("/v1/completions", json=BODY | {"logprobs": 1}) as response:
        logprobs = (await response.json())["choices"][0]["logprobs"]
    texts = [text_of(token_id) for token_id in IDS]
    assert logprobs["tokens"] == texts
    assert logprobs["token_logprobs"] == [-0.5] * 8
    assert logprobs["text_offset"] == [len("".join(texts[:i])) for i in range(8)]


BAD = {
    "malformed JSON": (b'{"model": "demo", ', 400, "invalid_argument"),
    "a body that is no object": (b"[1]", 400, "invalid_argument"),
    "an unknown field": (BODY | {"tempreature": 1}, 400, "invalid_argument"),
    "an unknown model": (BODY | {"model": "nobody"}, 404, "unknown_model"),
    "an empty prompt": (BODY | {"prompt": ""}, 400, "empty_prompt"),
    "no token ids": (BODY | {"prompt": []}, 400, "empty_prompt"),
    "a negative token id": (BODY | {"prompt": [-1]}, 400, "invalid_argument"),
    "a prompt too long": (BODY | {"prompt": "x" * 5000}, 400, "prompt_too_long"),
    "a negative temperature": (BODY | {"temperature": -0.1}, 400, "invalid_argument"),
    "a top_p of 0": (BODY | {"top_p": 0}, 400, "invalid_argument"),
    "a min_p over 1": (BODY | {"min_p": 1.5}, 400, "invalid_argument"),
    "no tokens wanted": (BODY | {"max_tokens": 0}, 400, "invalid_argument"),
    "a negative seed": (BODY | {"seed": -1}, 400, "invalid_argument"),
    "too many choices": (BODY | {"n": 1000}, 400, "invalid_argument"),
    "no choices": (BODY | {"n": 0}, 400, "invalid_argument"),
    "an empty stop text": (BODY | {"stop": [""]}, 400, "invalid_argument"),
    "something not supported": (BODY | {"echo": True}, 400, "unsupported"),
    "several prompts": (BODY | {"prompt": ["a", "b"]}, 400, "unsupported"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_gets_a_typed_error(rig: Rig, http: aiohttp.ClientSession, case: str) -> None:
    await rig.add_leader("demo-0")
    body, status, code = BAD[case]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http.post("/v1/completions", data=data) as response:
        answer = await response.json()
    assert (response.status, answer["error"]["code"]) == (status, code)
    assert answer["error"]["message"]
    assert rig.gateway.dispatcher.live == 0


async def test_bad_input_in_a_stream_is_an_error_before_the_stream(
    rig: Rig, http: aiohttp.ClientSession
) -> None:
    await rig.add_leader("demo-0")
    async with http.post("/v1/completions", json=BODY | {"prompt": "x" * 5000, "stream": True}) as response:
        assert response.status == 400
        assert response.content_type == "application/json"


async def test_an_unknown_path_is_a_typed_error(http: aiohttp.ClientSession) -> None:
    async with http.get("/v2/nothing") as response:
        assert response.status == 404
        assert (await response.json())["error"]["message"]


async def test_a_client_that_disconnects_leaves_nothing_behind(rig: Rig, http: aiohttp.ClientSession) -> None:
    leader = await rig.add_leader("demo-0", hold_at=2)
    response = await http.post("/v1/completions", json=BODY | {"stream": True})
    await response.content.readuntil(b"\n\n")
    response.close()
    await until(lambda: leader.cancels)
    assert rig.gateway.dispatcher.live == 0


async def test_models_health_and_metrics(rig: Rig, http: aiohttp.ClientSession) -> None:
    async with http.get("/health") as response:
        assert response.status == 503
    await rig.add_leader("demo-0")
    async with http.get("/health") as response:
        assert response.status == 200
    async with http.get("/v1/models") as response:
        (model,) = (await response.json())["data"]
    assert (model["id"], model["ready_replicas"], model["max_model_len"]) == ("demo", 1, 4096)
    async with http.post("/v1/completions", json=BODY) as response:
        await response.read()
    async with http.get("/metrics") as response:
        metrics = await response.text()
    assert "phalanx_accepted_total 1.0" in metrics
    assert "phalanx_finished_total 1.0" in metrics
    assert "phalanx_first_token_seconds_count 1.0" in metrics
    assert 'phalanx_replica_load{replica="demo-0"}' in metrics
