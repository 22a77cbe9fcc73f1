"""OpenAI-shaped HTTP in front of the gateway, with health and metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from dataplane.gateway import openai, openai_answer
from dataplane.gateway.gateway import Gateway, Live
from dataplane.gateway.journal import format_cursor
from dataplane.gateway.normalize import journal_for
from dataplane.gateway.server import models
from phalanx.runtime.errors import PhalanxError

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 16 << 20

GATEWAY = web.AppKey("gateway", Gateway)
_encode = msgspec.json.Encoder().encode


def application(gateway: Gateway) -> web.Application:
    """The routes. Run it with `handler_cancellation=True`, so that a client that leaves is noticed."""
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_typed_errors])
    app[GATEWAY] = gateway
    app.router.add_post("/v1/completions", _completions)
    app.router.add_post("/v1/chat/completions", _chat_completions)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/health", _health)
    app.router.add_get("/metrics", _metrics)
    return app


async def _completions(request: web.Request) -> web.StreamResponse:
    return await _generate(request, openai.CompletionRequest)


async def _chat_completions(request: web.Request) -> web.StreamResponse:
    return await _generate(request, openai.ChatRequest)


async def _generate(
    request: web.Request, shape: type[openai.CompletionRequest] | type[openai.ChatRequest]
) -> web.StreamResponse:
    asked = openai.parse(await request.read(), shape)
    journal = journal_for(openai.to_generate(asked))
    answer = openai_answer.Shape(asked, journal.request_id, int(time.time()))
    parent = request.headers.get("traceparent", "")
    async with request.app[GATEWAY].request(journal, parent=parent) as live:
        # Nothing is written before a replica has accepted: bad input still gets its status code.
        await live.accepted()
        headers = {"x-request-id": journal.request_id, "x-phalanx-replica": journal.replica}
        if asked.stream:
            return await _stream(request, live, answer, headers)
        chunks = [chunk async for chunk in live.chunks()]
        return _json(answer.whole(chunks, journal.usage), headers=headers)


async def _stream(
    request: web.Request, live: Live, answer: openai_answer.Shape, headers: dict[str, str]
) -> web.StreamResponse:
    """Server-sent events; each one's id is the cursor after it."""
    response = web.StreamResponse(
        headers={**headers, "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
    )
    await response.prepare(request)
    cursor = format_cursor(live.journal.start)
    try:
        async for chunk in live.chunks():
            cursor = format_cursor(chunk.cursor)
            await response.write(_event(cursor, answer.chunk(chunk)))
    except PhalanxError as error:
        # The status line is out; the stream ends with the error and without its [DONE].
        await response.write(_event(cursor, openai_answer.error_json(error)))
    else:
        if (last := answer.last(live.journal.usage)) is not None:
            await response.write(_event(cursor, last))
        await response.write(f"id: {cursor}\ndata: [DONE]\n\n".encode())
    await response.write_eof()
    return response


def _event(cursor: str, data: openai.Json) -> bytes:
    return b"id: %b\ndata: %b\n\n" % (cursor.encode(), _encode(data))


async def _models(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    data = [
        {
            "id": model.name,
            "object": "model",
            "created": model.created_unix_s,
            "owned_by": "phalanx",
            "max_model_len": model.max_model_len or None,
            "ready_replicas": model.ready_replicas,
        }
        for model in models(gateway.snapshot, gateway.dispatcher.router)
    ]
    return _json({"object": "list", "data": data})


async def _health(request: web.Request) -> web.Response:
    """200 while this gateway reaches a replica, 503 while it reaches none."""
    ready = len(request.app[GATEWAY].dispatcher.router.routes)
    return _json(
        {"status": "ok" if ready else "no replica is ready", "ready_replicas": ready}, 200 if ready else 503
    )


async def _metrics(request: web.Request) -> web.Response:
    body = request.app[GATEWAY].metrics.exposition()
    return web.Response(body=body, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _typed_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure answers with the same JSON object."""
    try:
        return await handler(request)
    except PhalanxError as error:
        headers = {"retry-after": "1"} if error.retryable else None
        return _json(openai_answer.error_json(error), error.http_status, headers)
    except web.HTTPRequestEntityTooLarge as error:
        too_large = PhalanxError("INVALID_ARGUMENT", f"the body exceeds {MAX_BODY_BYTES} bytes")
        return _json(openai_answer.error_json(too_large), error.status)
    except web.HTTPException as error:
        refused = PhalanxError("INVALID_ARGUMENT", f"{request.method} {request.path}: {error.reason}")
        return _json(openai_answer.error_json(refused), error.status)
    except Exception:
        log.exception("request failed", extra={"path": request.path})
        bug = PhalanxError("INTERNAL", "the gateway failed on this request; its log says more")
        return _json(openai_answer.error_json(bug), bug.http_status)


def _json(data: openai.Json, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=_encode(data), status=status, headers=headers, content_type="application/json")
