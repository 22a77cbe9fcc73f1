"""A replica's leader that answers with a model made of arithmetic, and fails on command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from phalanx.internal.v1 import shard_pb2, shard_pb2_grpc
from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import types_pb2


def token(prompt_ids: list[int], seed: int, choice: int, position: int) -> int:
    """What any replica generates: a function of the request and the position alone."""
    return (sum(prompt_ids) * 7 + seed * 13 + choice * 131 + position * 17) % 1000


def text_of(token_id: int) -> str:
    return f"{token_id} "


@dataclass
class _Attempt:
    """An attempt under way; it belongs to whichever stream asked for it last."""

    submit: shard_pb2.Submit
    frames: asyncio.Queue[shard_pb2.ServeResponse]
    outputs: list[shard_pb2.Delta]
    task: asyncio.Task[None] | None = None

    @property
    def key(self) -> dict[str, Any]:
        return {"request_id": self.submit.request_id, "attempt": self.submit.attempt}


class FakeLeader(shard_pb2_grpc.ShardServiceServicer):
    """Serves one replica in one epoch over real gRPC.

    No token from position `hold_at` on is sent before `release` is set.
    """

    def __init__(
        self, replica: str, epoch: int, *, model_hash: str = "m", hold_at: int | None = None
    ) -> None:
        self.replica, self.epoch, self.model_hash, self.hold_at = replica, epoch, model_hash, hold_at
        self.submits: list[shard_pb2.Submit] = []
        self.cancels: list[shard_pb2.CancelAttempt] = []
        self.acks: list[str] = []
        self.release = asyncio.Event()
        self.address = ""
        self._server = rpc.server()
        self._attempts: dict[str, _Attempt] = {}  # by resume key

    async def start(self) -> None:
        shard_pb2_grpc.add_ShardServiceServicer_to_server(self, self._server)
        self.address = rpc.bind(self._server, "127.0.0.1:0")
        await self._server.start()

    async def kill(self) -> None:
        """Die without a word to anyone."""
        await self._server.stop(None)
        for attempt in self._attempts.values():
            if attempt.task is not None:
                attempt.task.cancel()

    async def Serve(  # noqa: N802  # named by the proto
        self, request_iterator: AsyncIterator[shard_pb2.ServeRequest], context: Any
    ) -> None:
        frames: asyncio.Queue[shard_pb2.ServeResponse] = asyncio.Queue()

        async def listen() -> None:
            async for request in request_iterator:
                self._command(request, frames)

        first = await anext(aiter(request_iterator))
        if first.hello.epoch != self.epoch:
            await rpc.abort(context, PhalanxError("STALE_EPOCH", f"the epoch is {self.epoch}"))
        hello = shard_pb2.LeaderHello(
            worker="w", replica=self.replica, epoch=self.epoch, model_hash=self.model_hash, max_model_len=4096
        )
        await context.write(shard_pb2.ServeResponse(hello=hello))
        listener = asyncio.create_task(listen())
        try:
            while True:
                await context.write(await frames.get())
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            return
        finally:
            listener.cancel()

    def _command(
        self, request: shard_pb2.ServeRequest, frames: asyncio.Queue[shard_pb2.ServeResponse]
    ) -> None:
        match request.WhichOneof("frame"):
            case "submit":
                submit = request.submit
                # A copy: what the test looks at is what was sent.
                self.submits.append(shard_pb2.Submit.FromString(submit.SerializeToString()))
                outputs = list(submit.prior) or [shard_pb2.Delta(choice=i) for i in range(submit.n)]
                attempt = self._attempts[submit.resume_key] = _Attempt(submit, frames, outputs)
                attempt.task = asyncio.create_task(self._run(attempt))
            case "cancel":
                self.cancels.append(request.cancel)
                for attempt in self._attempts.values():
                    if attempt.submit.request_id == request.cancel.request_id and attempt.task is not None:
                        attempt.task.cancel()
            case "attach":
                self._attach(request.attach, frames)
            case "ack":
                self.acks.append(request.ack.resume_key)
                self._attempts.pop(request.ack.resume_key, None)

    def _attach(self, attach: shard_pb2.Attach, frames: asyncio.Queue[shard_pb2.ServeResponse]) -> None:
        attempt = self._attempts.get(attach.resume_key)
        if attempt is None:
            error = rpc.to_message(PhalanxError("UNKNOWN_REQUEST", "not here"))
            self._send(frames, failed=[shard_pb2.Failed(attempt=attach.attempt, error=error)])
            return
        attempt.submit.attempt, attempt.frames = attach.attempt, frames
        replay = shard_pb2.Submit.FromString(attempt.submit.SerializeToString())
        replay.token_ids.ids[:] = _ids(attempt.submit)
        replay.model_hash = self.model_hash
        replay.stopping.max_tokens = _budget(attempt.submit)
        del replay.prior[:]
        replay.prior.extend(attempt.outputs)
        self._send(frames, attached=[shard_pb2.Attached(attempt=attach.attempt, request=replay)])

    async def _run(self, attempt: _Attempt) -> None:
        submit, ids = attempt.submit, _ids(attempt.submit)
        if len(ids) > 4000:
            error = rpc.to_message(PhalanxError("PROMPT_TOO_LONG", f"{len(ids)} tokens exceed 4000"))
            self._send(attempt.frames, failed=[shard_pb2.Failed(**attempt.key, error=error)])
            return
        self._send(attempt.frames, accepted=[shard_pb2.Accepted(**attempt.key, prompt_ids=ids)])
        start = [len(output.token_ids) for output in attempt.outputs]
        budget = _budget(submit)
        for position in range(min(start), budget):
            if position == self.hold_at:
                await self.release.wait()
            deltas = []
            for choice in range(submit.n):
                if position >= start[choice]:
                    value = token(ids, submit.sampling.seed, choice, position)
                    chosen = types_pb2.TokenLogprob(token_id=value, text=text_of(value), logprob=-0.5)
                    logprobs = [types_pb2.PositionLogprobs(chosen=chosen, top=[chosen])]
                    delta = shard_pb2.Delta(
                        **attempt.key,
                        choice=choice,
                        index=position,
                        token_ids=[value],
                        pieces=[text_of(value)],
                        logprobs=logprobs if submit.HasField("logprobs") else [],
                        finish_reason=types_pb2.FINISH_REASON_LENGTH if position + 1 == budget else 0,
                    )
                    deltas.append(delta)
                    output = attempt.outputs[choice]
                    output.token_ids.append(value)
                    output.pieces.extend(delta.pieces)
                    output.logprobs.extend(delta.logprobs)
                    output.finish_reason = delta.finish_reason
            self._send(attempt.frames, deltas=deltas)
            await asyncio.sleep(0)

    def _send(self, frames: asyncio.Queue[shard_pb2.ServeResponse], **parts: Any) -> None:
        frame = shard_pb2.StepFrame(replica=self.replica, epoch=self.epoch, **parts)
        frames.put_nowait(shard_pb2.ServeResponse(step=frame))


def _ids(submit: shard_pb2.Submit) -> list[int]:
    return (
        list(submit.token_ids.ids)
        or list(submit.text.encode())
        or [len(message.content) for message in submit.chat.messages]
    )


def _budget(submit: shard_pb2.Submit) -> int:
    return submit.stopping.max_tokens or 32
