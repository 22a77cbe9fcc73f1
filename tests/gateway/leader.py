"""A replica's leader for tests: the real server, leader and request book over a model made of arithmetic.

The engine and the text process are not real. On command the leader dies, holds tokens back, sends a frame of
its own, or does not answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

from dataplane.shard.events import BeginServing
from dataplane.shard.leader import Leader
from dataplane.shard.outbox import Outbox
from dataplane.shard.server import ShardServer
from engine.ipc.wire import CancelRequest, Encode, Encoded, EngineReady, Message, Step, SubmitRequest
from engine.request import Delta, Load, PositionLogprobs, Request, TokenLogprob
from phalanx.internal.v1 import shard_pb2, shard_pb2_grpc
from phalanx.runtime import rpc

MAX_MODEL_LEN = 4096


def token(prompt_ids: list[int], seed: int, choice: int, position: int) -> int:
    """The token of any replica: a function of the request and the position alone."""
    return (sum(prompt_ids) * 7 + seed * 13 + choice * 131 + position * 17) % 1000


def text_of(token_id: int) -> str:
    return f"{token_id} "


class ArithmeticEngine:
    """An engine and a text process in one: a task per request, one position of all its choices per step."""

    def __init__(self, leader: TestLeader) -> None:
        self._leader, self._loop = leader, asyncio.get_running_loop()
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._ended: set[tuple[str, int | None]] = set()
        self._steps = 0

    def to_engine(self, message: Message) -> None:
        match message:
            case SubmitRequest(request):
                self._requests[request.id] = asyncio.create_task(self._run(request))
            case CancelRequest(id, None):
                if task := self._requests.pop(id, None):
                    task.cancel()

    def to_text(self, message: Message) -> None:
        match message:
            case Encode(id, text, messages):
                ids = text.encode() if text is not None else [len(content) for _, content in messages]
                self._loop.call_soon(self._leader.serving.encoded, Encoded(id, tuple(ids)))

    def kill(self) -> None:
        for task in self._requests.values():
            task.cancel()

    def _stepped(self, step: Step) -> None:
        self._leader.serving.stepped(step)
        self._leader.generated += sum(len(delta.token_ids) for delta in step.deltas)

    async def _run(self, request: Request) -> None:
        prompt, prior = list(request.prompt_ids), request.prior or ((),) * request.n
        budget = request.max_tokens or MAX_MODEL_LEN - len(prompt)
        self._step(accepted=(request.id,))
        for position in range(min(map(len, prior)), budget):
            if position == self._leader.hold_at:
                await self._leader.release.wait()
            self._step(
                deltas=tuple(
                    self._delta(request, prompt, choice, position, is_last=position + 1 == budget)
                    for choice in range(request.n)
                    if position >= len(prior[choice])
                )
            )
            # A real engine takes milliseconds per step: do not outrun the leader's writer.
            await asyncio.sleep(0 if position % 8 else 0.001)

    def _delta(self, request: Request, prompt: list[int], choice: int, position: int, is_last: bool) -> Delta:
        value = token(prompt, request.sampling.seed, choice, position)
        chosen = TokenLogprob(value, -0.5, text_of(value))
        return Delta(
            request.id,
            choice,
            position,
            (value,),
            (text_of(value),),
            () if request.logprobs is None else (PositionLogprobs(chosen, (chosen,)),),
            finish="length" if is_last else None,
        )

    def _step(self, **parts: Any) -> None:
        self._steps += 1
        self._loop.call_soon(self._stepped, Step(self._steps, Load(), **parts))


class _Leader(Leader):
    """Records the commands of gateways."""

    def __init__(self, test: TestLeader, serving: BeginServing) -> None:
        engine = ArithmeticEngine(test)
        super().__init__(
            serving,
            worker="w",
            incarnation="i",
            to_engine=engine.to_engine,
            to_text=engine.to_text,
            on_ended=lambda ended: None,
        )
        self.engine, self._test = engine, test

    def join(self, stream: int, incarnation: str) -> Outbox:
        outbox = super().join(stream, incarnation)
        self._test.outboxes.append(outbox)
        return outbox

    def command(self, stream: int, request: shard_pb2.ServeRequest) -> None:
        # A copy: tests read the command as it was sent, and the request book changes its own.
        copy = shard_pb2.ServeRequest.FromString(request.SerializeToString())
        match copy.WhichOneof("frame"):
            case "submit":
                self._test.submits.append(copy.submit)
            case "cancel":
                self._test.cancels.append(copy.cancel)
            case "ack":
                self._test.acks.append(copy.ack.resume_key)
            case "attach":
                self._test.attaches.append(copy.attach)
                if not self._test.answers_attach:
                    return
        super().command(stream, request)


class TestLeader:
    """Leads one replica in one epoch over real gRPC.

    No token from position `hold_at` on is generated before `release` is set. Without `answers_attach` a
    gateway that searches for a request gets no answer.
    """

    __test__ = False

    def __init__(
        self,
        replica: str,
        epoch: int,
        *,
        model_hash: str = "m",
        hold_at: int | None = None,
        answers_attach: bool = True,
    ) -> None:
        self.replica, self.epoch = replica, epoch
        self.hold_at, self.answers_attach = hold_at, answers_attach
        self.submits: list[shard_pb2.Submit] = []
        self.cancels: list[shard_pb2.CancelAttempt] = []
        self.attaches: list[shard_pb2.Attach] = []
        self.acks: list[str] = []
        self.generated = 0  # tokens
        self.outboxes: list[Outbox] = []
        self.release = asyncio.Event()
        self.address = ""
        self._server = rpc.server()
        ready = EngineReady(model_hash, MAX_MODEL_LEN, 1000, ())
        self.serving = _Leader(self, BeginServing(replica, epoch, 1, 1, ready))

    async def start(self) -> None:
        service = ShardServer("w", lambda request: shard_pb2.FormResponse())
        service.leader = self.serving
        shard_pb2_grpc.add_ShardServiceServicer_to_server(service, self._server)
        self.address = rpc.bind(self._server, "127.0.0.1:0")
        await self._server.start()

    def inject(self, frame: shard_pb2.StepFrame) -> None:
        """Send a frame that the request book did not make to every gateway."""
        for outbox in self.outboxes:
            outbox.put(frame)

    def answer_attach(self) -> None:
        """Answer the last Attach late, on the newest stream."""
        self.answers_attach = True
        request = shard_pb2.ServeRequest(attach=self.attaches[-1])
        self.serving.command(max(self.serving._outboxes), request)

    async def kill(self) -> None:
        """Die without closing any stream."""
        self.serving.engine.kill()
        await self._server.stop(None)
        self.serving._next_heartbeat.cancel()

    def pass_time(self, seconds: float) -> None:
        """Let the request book's timers run out that are due within `seconds`."""
        self.serving._do(self.serving._book.expire(asyncio.get_running_loop().time() + seconds))

    def check_integrity(self) -> None:
        self.serving._book.check_integrity()
