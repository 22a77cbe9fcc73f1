"""InferenceService: gRPC in front of the gateway."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from dataplane.gateway.gateway import Gateway
from dataplane.gateway.journal import Chunk, Journal
from dataplane.gateway.live import LiveRequest
from dataplane.gateway.models import models
from dataplane.gateway.normalize import journal_for
from dataplane.gateway.resume import Cursor, Ticket, format_cursor
from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError
from phalanx.runtime.filters import Fields
from phalanx.runtime.paging import page
from phalanx.v1 import inference_pb2, inference_pb2_grpc

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
MODEL_FIELDS = Fields(inference_pb2.Model.DESCRIPTOR, "name")

log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """The contract of each method is in protos/phalanx/v1/inference.proto."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    # Handlers write to their context and do not yield. When the client leaves, gRPC then cancels the handler
    # at its current await, which ends the request. A generator would only be closed when it is
    # garbage-collected.

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Stream one request."""
        try:
            async with aclosing(
                self._events(request, context.time_remaining(), _traceparent(context))
            ) as events:
                async for event in events:
                    await context.write(event)
        except PhalanxError as error:
            await rpc.abort(context, error)

    async def Converse(  # type: ignore[override]
        self, request_iterator: AsyncIterator[inference_pb2.ConverseRequest], context: Context
    ) -> None:
        """Stream many requests. The call ends once the client has half-closed it and all have ended."""
        # Bounded: a client that does not read blocks the writers of its own requests only.
        outbox: asyncio.Queue[inference_pb2.ConverseResponse | None] = asyncio.Queue(64)
        timeout_s, parent = context.time_remaining(), _traceparent(context)

        async def answer(request: inference_pb2.GenerateRequest) -> None:
            try:
                if not request.request_id:
                    raise PhalanxError("INVALID_ARGUMENT", "request_id must be set on a Converse stream")
                async with aclosing(self._events(request, timeout_s, parent)) as events:
                    async for event in events:
                        response = inference_pb2.ConverseResponse(request_id=request.request_id, event=event)
                        await outbox.put(response)
            except Exception as error:
                # This request gets exactly one error; the other requests of the call are not affected.
                if not isinstance(error, PhalanxError):
                    log.exception("request failed", extra={"request": request.request_id})
                    error = PhalanxError("INTERNAL", "the gateway failed on this request; its log says more")
                failed = inference_pb2.ConverseResponse(
                    request_id=request.request_id, error=rpc.to_message(error)
                )
                await outbox.put(failed)

        async def listen() -> None:
            own: set[str] = set()
            async with asyncio.TaskGroup() as answers:
                async for command in request_iterator:
                    if command.WhichOneof("command") == "generate":
                        own.add(command.generate.request_id)
                        answers.create_task(answer(command.generate))
                    elif command.cancel.request_id in own:
                        self._gateway.cancel(command.cancel.request_id)
            await outbox.put(None)

        async with asyncio.TaskGroup() as group:
            group.create_task(listen())
            while (response := await outbox.get()) is not None:
                await context.write(response)

    async def Cancel(
        self, request: inference_pb2.CancelRequest, context: Context
    ) -> inference_pb2.CancelResponse:
        """End a request of this gateway early."""
        return inference_pb2.CancelResponse(found=self._gateway.cancel(request.request_id))

    async def Resume(self, request: inference_pb2.ResumeRequest, context: Context) -> None:  # type: ignore[override]
        """Continue a stream that this or another gateway began."""
        try:
            ticket = Ticket.parse(request.resume_token)
            cursor = ticket.cursor(request.cursor)
            async with (
                self._gateway.resume(ticket, parent=_traceparent(context)) as live,
                aclosing(_events(live, cursor)) as events,
            ):
                async for event in events:
                    await context.write(inference_pb2.ResumeResponse(event=event))
        except PhalanxError as error:
            await rpc.abort(context, error)

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.GetModelResponse:
        """Show one model."""
        model = self._models().get(request.name)
        if model is None:
            unknown = PhalanxError(
                "UNKNOWN_MODEL", f"model {request.name!r} is not served here", param="name"
            )
            await rpc.abort(context, unknown)
        return inference_pb2.GetModelResponse(model=model)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """List models, one per deployment."""
        try:
            found, token = page(self._models(), request, MODEL_FIELDS)
        except PhalanxError as error:
            await rpc.abort(context, error)
        return inference_pb2.ListModelsResponse(models=found, next_page_token=token)

    def _models(self) -> dict[str, inference_pb2.Model]:
        """The models by name."""
        listed = models(self._gateway.snapshot, self._gateway.dispatcher.router)
        return {model.name: model for model in listed}

    async def _events(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None, parent: str
    ) -> AsyncGenerator[inference_pb2.GenerateResponse]:
        journal = journal_for(request)
        async with self._gateway.request(journal, timeout_s=timeout_s, parent=parent) as live:
            await live.accepted()
            async with aclosing(_events(live, journal.start)) as events:
                async for event in events:
                    yield event


async def _events(live: LiveRequest, cursor: Cursor) -> AsyncGenerator[inference_pb2.GenerateResponse]:
    """The events of an accepted request from `cursor` on."""
    journal, chunks = live.journal, live.chunks(cursor)
    yield _started(journal, cursor)
    async for chunk in chunks:
        yield _chunk(journal, chunk)
        cursor = chunk.cursor
    yield inference_pb2.GenerateResponse(
        request_id=journal.request_id,
        cursor=format_cursor(cursor),
        finished=inference_pb2.Finished(usage=journal.usage),
    )


def _started(journal: Journal, cursor: Cursor) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        request_id=journal.request_id,
        cursor=format_cursor(cursor),
        started=inference_pb2.Started(
            model=journal.model,
            seed=journal.template.sampling.seed,
            prompt_tokens=len(journal.prompt_ids or ()),
            resume_token=str(journal.ticket),
        ),
    )


def _chunk(journal: Journal, chunk: Chunk) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        request_id=journal.request_id,
        cursor=format_cursor(chunk.cursor),
        chunk=inference_pb2.Chunk(
            choice=chunk.choice,
            index=chunk.index,
            token_ids=chunk.token_ids,
            text=chunk.text,
            logprobs=chunk.logprobs,
            finish_reason=chunk.finish,
            prompt_logprobs=chunk.prompt_logprobs,
        ),
    )


def _traceparent(context: Context) -> str:
    metadata: Any = context.invocation_metadata() or ()
    return next((str(value) for key, value in metadata if key == "traceparent"), "")
