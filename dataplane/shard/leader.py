"""One epoch on a replica's leader: carries requests between gateways, the engine and the text process.

Owns: the epoch's request book, its gateways' outboxes, the book's nearest timer.
Does not own: the children (`worker`), the gRPC streams (`server`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from dataplane.shard.admission import ServedModel
from dataplane.shard.attempts import Ended
from dataplane.shard.events import BeginServing
from dataplane.shard.outbox import Outbox
from dataplane.shard.requests import Instruction, RequestBook, ToEngine, ToGateway, ToText
from engine.ipc.wire import Encoded, Message, NotEncoded, Step
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError

HEARTBEAT_S = 0.25
"""Between two frames that only tell gateways that this process runs."""


class Leader:
    """Carries out the request book's instructions, until the epoch ends."""

    def __init__(
        self,
        serving: BeginServing,
        *,
        worker: str,
        incarnation: str,
        to_engine: Callable[[Message], None],
        to_text: Callable[[Message], None],
        on_ended: Callable[[Ended], None],
    ) -> None:
        self.replica, self.epoch = serving.replica, serving.epoch
        self.hello = shard_pb2.LeaderHello(
            worker=worker,
            incarnation=incarnation,
            replica=serving.replica,
            epoch=serving.epoch,
            model_hash=serving.ready.model_hash,
            max_model_len=serving.ready.max_model_len,
            vocab_size=serving.ready.vocab_size,
            eos_token_ids=serving.ready.eos_token_ids,
        )
        self._to_engine, self._to_text, self._on_ended = to_engine, to_text, on_ended
        model = ServedModel(
            serving.ready.model_hash, serving.ready.max_model_len, serving.longest_token_bytes
        )
        self._book = RequestBook(serving.replica, serving.epoch, model)
        self._outboxes: dict[int, Outbox] = {}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._next_heartbeat = self._loop.call_later(HEARTBEAT_S, self._heartbeat)

    @property
    def pending(self) -> int:
        """Requests that have not ended."""
        return len(self._book)

    def join(self, stream: int, incarnation: str) -> Outbox:
        """A gateway's stream begins; `incarnation` is the gateway's."""
        outbox = self._outboxes[stream] = Outbox()
        self._do(self._book.join(stream, incarnation))
        return outbox

    def leave(self, stream: int) -> None:
        """A gateway's stream is over. Idempotent."""
        self._outboxes.pop(stream, None)
        self._do(self._book.leave(stream, self._loop.time()))

    def command(self, stream: int, request: shard_pb2.ServeRequest) -> None:
        """Take a command of a gateway. Raises PhalanxError on a frame that is no command."""
        if stream not in self._outboxes:
            return
        match request.WhichOneof("frame"):
            case "submit":
                self._do(self._book.submit(stream, request.submit, self._loop.time()))
            case "cancel":
                self._do(self._book.cancel(stream, request.cancel.request_id, request.cancel.attempt))
            case "attach":
                self._do(self._book.attach(stream, request.attach, self._loop.time()))
            case "ack":
                self._do(self._book.ack(request.ack.resume_key, self._loop.time()))
            case other:
                raise PhalanxError("INVALID_ARGUMENT", f"unexpected frame on an open stream: {other}")

    def stepped(self, step: Step) -> None:
        """A step of this epoch's engine has got its text."""
        self._do(self._book.stepped(step, self._loop.time()))

    def encoded(self, answer: Encoded | NotEncoded) -> None:
        """The text process has tokenised a prompt, or could not."""
        self._do(self._book.encoded(answer))

    def end(self, reason: str) -> None:
        """End every stream at once, so that gateways replay their requests elsewhere."""
        self._next_heartbeat.cancel()
        self._do(self._book.end())
        for stream, outbox in list(self._outboxes.items()):
            outbox.close(
                PhalanxError("UNREACHABLE", f"{self.replica} has ended epoch {self.epoch}: {reason}")
            )
            self.leave(stream)

    def _heartbeat(self) -> None:
        self._next_heartbeat = self._loop.call_later(HEARTBEAT_S, self._heartbeat)
        self._do(self._book.heartbeat())

    def _do(self, todo: Iterable[Instruction]) -> None:
        for instruction in todo:
            match instruction:
                case ToEngine(message):
                    self._to_engine(message)
                case ToText(message):
                    self._to_text(message)
                case ToGateway(stream, frame):
                    if stream in self._outboxes and not self._outboxes[stream].put(frame):
                        self.leave(stream)
                case Ended():
                    self._on_ended(instruction)
        self._arm()

    def _arm(self) -> None:
        """Wake up at the book's nearest timer."""
        when = self._book.next_timer()
        if self._timer is not None and self._timer.when() != when:
            self._timer.cancel()
            self._timer = None
        if when is not None and self._timer is None:
            self._timer = self._loop.call_at(when, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._do(self._book.expire(self._loop.time()))
