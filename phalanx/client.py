"""The Python client: streams completions from a cluster's gateways over gRPC.

async with Client("10.0.0.1:8001", "10.0.0.2:8001") as client:
    async for event in client.generate("demo", "def main(", max_tokens=64):
        print(event.chunk.text, end="")
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import inference_pb2, inference_pb2_grpc, types_pb2

RESUME_WITHIN_S = 30.0
_PAUSE_S = 0.1
# What another gateway, or the same one later, may do better. A request's own errors are none of these.
_ELSEWHERE = ("UNREACHABLE", "STORE_UNAVAILABLE")


class Client:
    """Connections to the gateways of one cluster. Failures raise `phalanx.runtime.errors.PhalanxError`.

    A stream whose gateway fails goes on at the next one, where it was.
    """

    def __init__(self, target: str, *others: str) -> None:
        self._channels = [rpc.channel(each) for each in (target, *others)]
        self._stubs: list[Any] = [inference_pb2_grpc.InferenceServiceStub(each) for each in self._channels]
        self._first = 0  # the gateway that answered last

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End every call and connection."""
        for channel in self._channels:
            await channel.close(None)

    async def generate(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        bad_words: Sequence[str] = (),
        json_schema: str | None = None,
        regex: str | None = None,
        min_tokens: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        n: int = 1,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Stream the completion of a text or of token ids: Started, Chunks, Finished.

        Parameters left out take the defaults that types.proto documents. Of `json_schema`, as JSON text,
        and `regex` one can be given.
        """
        if json_schema is not None and regex is not None:
            raise ValueError("json_schema and regex exclude each other")
        grammar = None
        if json_schema is not None:
            grammar = types_pb2.Grammar(json_schema=json_schema)
        elif regex is not None:
            grammar = types_pb2.Grammar(regex=regex)
        request = inference_pb2.GenerateRequest(
            model=model,
            sampling=types_pb2.Sampling(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                seed=seed,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                logit_bias=logit_bias,
                bad_words=bad_words,
                grammar=grammar,
            ),
            stopping=types_pb2.Stopping(
                max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos, min_tokens=min_tokens
            ),
            n=n,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            priority=priority,
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.token_ids.ids[:] = prompt
            request.token_ids.SetInParent()
        async for event in self.stream(request, timeout_s=timeout_s):
            yield event

    async def stream(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Stream any request; leaving the loop early cancels it.

        Raises PhalanxError UNREACHABLE where no gateway could go on with it within `RESUME_WITHIN_S`.
        """
        token, cursor, tries, failing_since = "", "", 0, 0.0
        turn, started = self._first, False
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                async for event in self._attempt(turn, request, token, cursor, left):
                    self._first, failing_since = turn, 0.0
                    cursor = event.cursor
                    if not event.HasField("started"):
                        yield event
                    elif not started:
                        token, started = event.started.resume_token, True
                        yield event
                return
            except PhalanxError as error:
                now, tries = time.monotonic(), tries + 1
                failing_since = failing_since or now
                # What no gateway has taken is refused by every one once; what one has is worth some patience.
                hopeless = now > failing_since + RESUME_WITHIN_S if token else tries >= len(self._stubs)
                hopeless |= started and not token  # what has begun there cannot be had elsewhere
                if hopeless or error.reason not in _ELSEWHERE:
                    raise
            turn = (turn + 1) % len(self._stubs)
            if turn == self._first:
                await asyncio.sleep(_PAUSE_S)

    async def _attempt(
        self,
        turn: int,
        request: inference_pb2.GenerateRequest,
        token: str,
        cursor: str,
        timeout_s: float | None,
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """The stream as one gateway tells it."""
        stub = self._stubs[turn]
        if token:
            resume = inference_pb2.ResumeRequest(resume_token=token, cursor=cursor)
            call = stub.Resume(resume, timeout=timeout_s)
        else:
            call = stub.Generate(request, timeout=timeout_s)
        try:
            async for event in call:
                yield event.event if token else event
        except grpc.aio.AioRpcError as error:
            raise rpc.to_error(error) from error
        finally:
            call.cancel()

    async def models(self) -> list[inference_pb2.Model]:
        """The models that can be named in a request."""
        try:
            response = await self._stubs[self._first].ListModels(inference_pb2.ListModelsRequest())
        except grpc.aio.AioRpcError as error:
            raise rpc.to_error(error) from error
        return list(response.models)
