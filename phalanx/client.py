"""The Python client: streams completions from a cluster's gateways over gRPC.

async with Client("10.0.0.1:8001", "10.0.0.2:8001") as client:
    async for event in client.generate("demo", "def main(", max_tokens=64):
        print(event.chunk.text, end="")
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Any, Self

import grpc

from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import inference_pb2, inference_pb2_grpc, types_pb2

BEGIN_WITHIN_S = 5.0
"""How long a new request looks for a gateway that answers; a restarted gateway answers within this time."""
RESUME_WITHIN_S = 30.0
"""How long a stream that has begun looks for a gateway that answers."""
_PAUSE_S = 0.1  # between rounds over all gateways
_RETRY_ELSEWHERE = ("UNREACHABLE", "STORE_UNAVAILABLE")  # errors of a gateway, not of the request


class _DivergedError(PhalanxError):
    """A request that was sent again got other tokens than the first time."""


class Client:
    """Connections to the gateways of one cluster. Failures raise `phalanx.runtime.errors.PhalanxError`.

    Owns: the channels, and which gateway answered last. Does not own: streams, which belong to their callers.

    When the gateway of a stream fails, the client resumes the stream at the next gateway, after the last
    received event.
    """

    def __init__(self, target: str, *others: str) -> None:
        self._channels = [rpc.channel(each) for each in (target, *others)]
        self._stubs: list[Any] = [inference_pb2_grpc.InferenceServiceStub(each) for each in self._channels]
        self._current = 0  # the gateway that answered last; new requests begin there

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel every call and close every connection."""
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

        inference.proto and types.proto document the parameters and their defaults. `json_schema` is JSON
        text. `timeout_s` limits the whole stream.

        Raises:
            ValueError: both `json_schema` and `regex` are given.
            PhalanxError: as `stream` does.
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
        """Stream any request. A caller that leaves the loop early cancels the request.

        When the cluster does not know the stream any more, the client sends the request again with the same
        seed. If its tokens equal those received before, the stream continues after them. So a stream survives
        a broken connection to a living gateway, and the death of its gateway and its replica within its first
        second.

        Raises:
            PhalanxError: UNREACHABLE when no gateway answers for `BEGIN_WITHIN_S`, or for `RESUME_WITHIN_S`
                after Started. UNKNOWN_REQUEST when the request, sent again, gets other tokens. Every other
                reason as the gateway gives it.
        """
        begun: inference_pb2.Started | None = None
        delivered: defaultdict[int, list[int]] = defaultdict(list)  # token ids by choice
        token, cursor, failing_since, turn = "", "", 0.0, self._current
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if token:
                attempt = self._resume(turn, token, cursor, left)
            elif begun is not None:
                attempt = self._send_again(turn, request, begun.seed, delivered, cursor, left)
            else:
                attempt = self._generate(turn, request, left)
            try:
                async with aclosing(attempt) as events:
                    async for event in events:
                        self._current, cursor = turn, event.cursor
                        if event.HasField("started"):
                            token = event.started.resume_token
                            if begun is None:
                                begun, failing_since = event.started, 0.0
                                yield event
                            continue
                        failing_since = (
                            0.0  # Started alone does not reset it: every attempt may fail right after Started
                        )
                        delivered[event.chunk.choice] += event.chunk.token_ids
                        yield event
                        if event.HasField("finished"):
                            return
                return
            except _DivergedError:
                raise
            except PhalanxError as error:
                now = time.monotonic()
                failing_since = failing_since or now
                if begun is not None and not begun.resume_token:
                    raise
                if error.reason == "UNKNOWN_REQUEST" and begun is not None:
                    token = ""
                elif error.reason not in _RETRY_ELSEWHERE:
                    raise
                if now > failing_since + (BEGIN_WITHIN_S if begun is None else RESUME_WITHIN_S):
                    raise
            turn = (turn + 1) % len(self._stubs)
            if turn == self._current:
                await asyncio.sleep(_PAUSE_S)

    async def _generate(
        self, turn: int, request: inference_pb2.GenerateRequest, timeout_s: float | None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse]:
        """A new stream from one gateway."""
        with _calling(self._stubs[turn].Generate(request, timeout=timeout_s)) as call:
            async for event in call:
                yield event

    async def _resume(
        self, turn: int, token: str, cursor: str, timeout_s: float | None
    ) -> AsyncGenerator[inference_pb2.GenerateResponse]:
        """The rest of a stream after `cursor`, from one gateway."""
        request = inference_pb2.ResumeRequest(resume_token=token, cursor=cursor)
        with _calling(self._stubs[turn].Resume(request, timeout=timeout_s)) as call:
            async for response in call:
                yield response.event

    async def _send_again(
        self,
        turn: int,
        request: inference_pb2.GenerateRequest,
        seed: int,
        delivered: Mapping[int, Sequence[int]],
        cursor: str,
        timeout_s: float | None,
    ) -> AsyncGenerator[inference_pb2.GenerateResponse]:
        """Repeat the request with its seed, compare its tokens with `delivered`, continue after `cursor`."""
        same = inference_pb2.GenerateRequest()
        same.CopyFrom(request)
        same.sampling.seed = seed
        token, anew = "", defaultdict[int, list[int]](list)
        # Keep this call open until Resume has displaced it: closing it earlier cancels the request.
        with _calling(self._stubs[turn].Generate(same, timeout=timeout_s)) as call:
            async for event in call:
                if event.HasField("started"):
                    token = event.started.resume_token
                anew[event.chunk.choice] += event.chunk.token_ids
                if all(len(anew[choice]) >= len(ids) for choice, ids in delivered.items()):
                    break
            if any(anew[choice][: len(ids)] != ids for choice, ids in delivered.items()):
                message = "the cluster lost the request, and the repeated request got other tokens"
                raise _DivergedError("UNKNOWN_REQUEST", message)
            async with aclosing(self._resume(turn, token, cursor, timeout_s)) as events:
                async for event in events:
                    yield event

    async def models(self) -> list[inference_pb2.Model]:
        """All models that a request can name."""
        request = inference_pb2.ListModelsRequest()
        found: list[inference_pb2.Model] = []
        try:
            while True:
                response = await self._stubs[self._current].ListModels(request)
                found += response.models
                if not response.next_page_token:
                    return found
                request.page_token = response.next_page_token
        except grpc.aio.AioRpcError as error:
            raise rpc.to_error(error) from error


@contextmanager
def _calling(call: Any) -> Iterator[Any]:
    """Cancel the call at the end of the block; turn its errors into PhalanxErrors."""
    try:
        yield call
    except grpc.aio.AioRpcError as error:
        raise rpc.to_error(error) from error
    finally:
        call.cancel()
