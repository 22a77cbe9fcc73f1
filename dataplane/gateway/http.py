"""The OpenAI-compatible HTTP API, with health and metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from dataplane.gateway import openai, openai_answer
from dataplane.gateway.gateway import Gateway
from dataplane.gateway.journal import Journal
from dataplane.gateway.live import LiveRequest
from dataplane.gateway.models import models
from dataplane.gateway.normalize import journal_for
from dataplane.gateway.resume import Cursor, Ticket, format_cursor
from phalanx.runtime.errors import PhalanxError

log = logging.getLogger(__name__)
MAX_BODY_BYTES = 16 << 20

GATEWAY = web.AppKey("gateway", Gateway)
_encode = msgspec.json.Encoder().encode


def application(gateway: Gateway) -> web.Application:
    """The routes. Run it with `handler_cancellation=True`, so that a request ends when its client leaves."""
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_typed_errors])
    app[GATEWAY] = gateway
    app.router.add_post("/v1/completions", _completions)
    app.router.add_post("/v1/chat/completions", _chat_completions)
    app.router.add_get("/v1/requests/{resume_token}/stream", _resume)
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
    answer_format = openai_answer.AnswerFormat.of(asked, journal.request_id, int(time.time()))
    journal.template.answer = _encode(answer_format)
    parent = request.headers.get("traceparent", "")
    async with request.app[GATEWAY].request(journal, parent=parent) as live:
        # Write nothing before a replica has accepted the request: bad input must get its own status code.
        await live.accepted()
        headers = {"x-request-id": journal.request_id, "x-phalanx-replica": journal.replica}
        if asked.stream:
            return await _stream(request, live, journal.start, headers)
        chunks = [chunk async for chunk in live.chunks()]
        whole = openai_answer.AnswerBuilder(answer_format).whole(chunks, journal.usage)
        return _json(whole, headers=headers)


async def _resume(request: web.Request) -> web.StreamResponse:
    """Continue a stream after the event named by Last-Event-ID, or from its beginning without that header."""
    ticket = Ticket.parse(request.match_info["resume_token"])
    cursor = ticket.cursor(request.headers.get("last-event-id", ""))
    parent = request.headers.get("traceparent", "")
    async with request.app[GATEWAY].resume(ticket, parent=parent) as live:
        return await _stream(request, live, cursor, {"x-request-id": live.journal.request_id})


async def _stream(
    request: web.Request, live: LiveRequest, cursor: Cursor, headers: dict[str, str]
) -> web.StreamResponse:
    """Server-sent events from `cursor` on. The id of each event is the cursor after it."""
    journal = live.journal
    if token := str(journal.ticket):
        headers["x-phalanx-resume-token"] = token
    response = web.StreamResponse(
        headers={**headers, "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
    )
    chunks, answer = live.chunks(cursor), _builder(journal)
    await response.prepare(request)
    try:
        async for chunk in chunks:
            cursor = chunk.cursor
            await response.write(_event(cursor, answer.chunk(chunk)))
    except PhalanxError as error:
        # The status line is written already: the stream ends with the error and without [DONE].
        await response.write(_event(cursor, openai_answer.error_json(error)))
    else:
        if (last := answer.last(journal.usage)) is not None:
            await response.write(_event(cursor, last))
        await response.write(f"id: {format_cursor(cursor)}\ndata: [DONE]\n\n".encode())
    await response.write_eof()
    return response


def _builder(journal: Journal) -> openai_answer.AnswerBuilder:
    """The builder of a request's answer. A request that came by gRPC is answered as a completion."""
    if journal.template.answer:
        answer_format = msgspec.json.decode(journal.template.answer, type=openai_answer.AnswerFormat)
    else:
        answer_format = openai_answer.AnswerFormat(
            f"cmpl-{journal.request_id}", int(time.time()), journal.model
        )
    return openai_answer.AnswerBuilder(
        answer_format, lambda choice, index: sum(map(len, journal.choices[choice].pieces[:index]))
    )


def _event(cursor: Cursor, data: openai.Json) -> bytes:
    return b"id: %b\ndata: %b\n\n" % (format_cursor(cursor).encode(), _encode(data))


async def _models(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    data = [
        {
            "id": model.name,
            "object": "model",
            "created": model.create_time.seconds,
            "owned_by": "phalanx",
            "max_model_len": model.max_model_len or None,
            "ready_replicas": model.ready_replicas,
        }
        for model in models(gateway.snapshot, gateway.dispatcher.router)
    ]
    return _json({"object": "list", "data": data})


async def _health(request: web.Request) -> web.Response:
    """200 while this gateway has a stream to a replica, else 503."""
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
    """Answer every failure with the same JSON error object."""
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
        resource = request.match_info.route.resource  # not the path, which may contain a resume token
        log.exception("request failed", extra={"path": resource.canonical if resource else ""})
        bug = PhalanxError("INTERNAL", "the gateway failed on this request; its log says more")
        return _json(openai_answer.error_json(bug), bug.http_status)


def _json(data: openai.Json, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=_encode(data), status=status, headers=headers, content_type="application/json")
