"""A replica's leader that answers with a model made of arithmetic, and fails on command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import shard_pb2, shard_pb2_grpc, types_pb2


def token(prompt_ids: list[int], seed: int, choice: int, position: int) -> int:
    """What any replica generates: a function of the request and the position alone."""
    return (sum(prompt_ids) * 7 + seed * 13 + choice * 131 + position * 17) % 1000


def text_of(token_id: int) -> str:
    return f"{token_id} "


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
        self.release = asyncio.Event()
        self.address = ""
        self._server = rpc.server()
        self._frames: asyncio.Queue[shard_pb2.ServeResponse] = asyncio.Queue()
        self._running: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        shard_pb2_grpc.add_ShardServiceServicer_to_server(self, self._server)
        self.address = rpc.bind(self._server, "127.0.0.1:0")
        await self._server.start()

    async def kill(self) -> None:
        """Die without a word to anyone."""
        await self._server.stop(None)
        for task in self._running.values():
            task.cancel()

    async def Serve(  # noqa: N802  # named by the proto
        self, request_iterator: AsyncIterator[shard_pb2.ServeRequest], context: Any
    ) -> None:
        async def listen() -> None:
            async for request in request_iterator:
                match request.WhichOneof("frame"):
                    case "submit":
                        self.submits.append(request.submit)
                        self._running[request.submit.request_id] = asyncio.create_task(
                            self._run(request.submit)
                        )
                    case "cancel":
                        self.cancels.append(request.cancel)
                        self._running[request.cancel.request_id].cancel()

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
                await context.write(await self._frames.get())
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            return
        finally:
            listener.cancel()

    async def _run(self, submit: shard_pb2.Submit) -> None:
        key = {"request_id": submit.request_id, "attempt": submit.attempt}
        ids = (
            list(submit.token_ids.ids)
            or list(submit.text.encode())
            or [len(m.content) for m in submit.chat.messages]
        )
        if len(ids) > 4000:
            error = rpc.to_message(PhalanxError("PROMPT_TOO_LONG", f"{len(ids)} tokens exceed 4000"))
            self._send(failed=[shard_pb2.Failed(**key, error=error)])
            return
        self._send(accepted=[shard_pb2.Accepted(**key, prompt_ids=ids)])
        start = [len(prior.token_ids) for prior in submit.prior] or [0] * submit.n
        budget = submit.stopping.max_tokens or 32
        for position in range(min(start), budget):
            if position == self.hold_at:
                await self.release.wait()
            deltas = []
            for choice in range(submit.n):
                if position >= start[choice]:
                    value = token(ids, submit.sampling.seed, choice, position)
                    finish = types_pb2.FINISH_REASON_LENGTH if position + 1 == budget else 0
                    chosen = types_pb2.TokenLogprob(token_id=value, text=text_of(value), logprob=-0.5)
                    logprobs = [types_pb2.PositionLogprobs(chosen=chosen, top=[chosen])]
                    deltas.append(
                        shard_pb2.Delta(
                            **key,
                            choice=choice,
                            index=position,
                            token_ids=[value],
                            pieces=[text_of(value)],
                            logprobs=logprobs if submit.HasField("logprobs") else [],
                            finish_reason=finish,
                        )
                    )
            self._send(deltas=deltas)
            await asyncio.sleep(0)

    def _send(self, **parts: Any) -> None:
        frame = shard_pb2.StepFrame(replica=self.replica, epoch=self.epoch, **parts)
        self._frames.put_nowait(shard_pb2.ServeResponse(step=frame))
