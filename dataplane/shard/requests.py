"""The requests of one epoch on its leader, as a pure state machine.

Commands of gateways, steps of the engine and answers of the text process in; messages to all three out.
No sockets, no clock: `now` is an argument, in seconds on the monotonic clock.

Owns: which attempts are live, which stream each belongs to, what each stream has been told.
Does not own: tokens and KV (the engine), text (the text process), streams (`leader`).

The life of an attempt: tokenised, unless its ids are given; tracked by the text process; queued in the
engine; accepted; its deltas passed up; forgotten when its last choice ends.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field

from dataplane.shard import admission, convert
from dataplane.shard.admission import ServedModel
from engine.request import Delta, Load, Timing
from engine.wire import (
    CancelRequest,
    Encode,
    Encoded,
    Forget,
    Message,
    NotEncoded,
    Step,
    SubmitRequest,
    Track,
)
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import shard_pb2

LOAD_EVERY_STEPS = 32
MAX_TOMBSTONES = 4096  # per stream; a cancel overtakes its Submit by far less


@dataclass(frozen=True, slots=True)
class ToEngine:
    """Send this to the engine."""

    message: Message


@dataclass(frozen=True, slots=True)
class ToText:
    """Send this to the text process."""

    message: Message


@dataclass(frozen=True, slots=True)
class ToGateway:
    """Send this frame up a stream."""

    stream: int
    frame: shard_pb2.StepFrame


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt is over: what a trace tells of it. `timings` has one entry per choice that the engine ended.

    `error` is the reason of its failure, CANCELLED included, empty when it finished.
    """

    traceparent: str
    request_id: str
    attempt: int
    prompt_tokens: int
    completion_tokens: int
    timings: tuple[Timing, ...]
    error: str


Instruction = ToEngine | ToText | ToGateway | Ended


@dataclass(slots=True)
class _Stream:
    """One gateway's stream and what it was told last."""

    load: Load = field(default_factory=Load)
    step: int = 0
    attempts: dict[tuple[str, int], _Attempt] = field(default_factory=dict)
    tombstones: OrderedDict[tuple[str, int], None] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class _Attempt:
    id: str
    stream: int
    submit: shard_pb2.Submit
    deadline: float | None
    live: set[int]  # choices that have not ended, as the gateway knows
    prompt_ids: tuple[int, ...] | None = None  # None while it is tokenised
    ended_by_engine: set[int] = field(default_factory=set)
    generated: int = 0
    timings: list[Timing] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        return self.submit.request_id, self.submit.attempt


class RequestBook:
    """The state machine."""

    def __init__(self, replica: str, epoch: int, model: ServedModel) -> None:
        self._replica, self._epoch, self._model = replica, epoch, model
        self._streams: dict[int, _Stream] = {}
        self._attempts: dict[str, _Attempt] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap; entries of ended attempts are passed over
        self._step = 0
        self._load = Load()

    def __len__(self) -> int:
        """Attempts that are live."""
        return len(self._attempts)

    def join(self, stream: int) -> list[Instruction]:
        """A gateway opened a stream. `stream` is a number that no stream of this boot had before."""
        self._streams[stream] = _Stream(self._load, self._step)
        return [ToGateway(stream, self._frame())]

    def leave(self, stream: int) -> list[Instruction]:
        """A stream is gone, and with it everything that it had asked for. Idempotent."""
        left = self._streams.pop(stream, None)
        if left is None:
            return []
        return [todo for attempt in left.attempts.values() for todo in self._drop(attempt, "CANCELLED")]

    def submit(self, stream: int, submit: shard_pb2.Submit, now: float) -> list[Instruction]:
        """Start an attempt. One that is live already goes on; one that was cancelled is refused."""
        book, key = self._streams[stream], (submit.request_id, submit.attempt)
        if key in book.attempts:
            return []
        if key in book.tombstones:
            return [self._refuse(stream, submit, "CANCELLED", "the attempt was cancelled before it came")]
        try:
            admission.admit(submit, self._model)
        except PhalanxError as error:
            return [self._refuse(stream, submit, error.reason, error.message)]
        attempt = _Attempt(
            id=f"{stream}/{submit.request_id}/{submit.attempt}",
            stream=stream,
            submit=submit,
            deadline=now + submit.deadline_ms / 1000 if submit.deadline_ms else None,
            live={
                choice for choice in range(submit.n) if not (submit.prior and submit.prior[choice].finished)
            },
        )
        book.attempts[key] = self._attempts[attempt.id] = attempt
        if attempt.deadline is not None:
            heapq.heappush(self._deadlines, (attempt.deadline, attempt.id))
        longest, words = self._model.max_model_len, tuple(submit.sampling.bad_words)
        match submit.WhichOneof("prompt"):
            case "token_ids":
                if words:
                    return [ToText(Encode(attempt.id, bad_words=words))]
                return self._queue(attempt, tuple(submit.token_ids.ids))
            case "chat":
                messages = tuple((message.role, message.content) for message in submit.chat.messages)
                encode = Encode(attempt.id, messages=messages, max_model_len=longest, bad_words=words)
                return [ToText(encode)]
            case _:
                encode = Encode(attempt.id, text=submit.text, max_model_len=longest, bad_words=words)
                return [ToText(encode)]

    def cancel(self, stream: int, request_id: str, attempt: int) -> list[Instruction]:
        """End an attempt, or remember that it must not start. Idempotent."""
        book, key = self._streams[stream], (request_id, attempt)
        book.tombstones[key] = None
        if len(book.tombstones) > MAX_TOMBSTONES:
            book.tombstones.popitem(last=False)
        live = book.attempts.get(key)
        return [] if live is None else self._drop(live, "CANCELLED")

    def expire(self, now: float) -> list[Instruction]:
        """End every attempt whose deadline has passed."""
        todo: list[Instruction] = []
        frames: dict[int, shard_pb2.StepFrame] = {}
        reason, message = "DEADLINE_EXCEEDED", "the request's deadline has passed"
        while self._deadlines and self._deadlines[0][0] <= now:
            attempt = self._attempts.get(heapq.heappop(self._deadlines)[1])
            if attempt is not None:
                frame = self._frame_of(frames, attempt)
                frame.failed.append(convert.to_failed(*attempt.key, reason, message))
                todo += self._drop(attempt, reason)
        return [*(ToGateway(stream, frame) for stream, frame in frames.items()), *todo]

    def next_deadline(self) -> float | None:
        """When `expire` should be called next."""
        while self._deadlines and self._deadlines[0][1] not in self._attempts:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def encoded(self, answer: Encoded | NotEncoded) -> list[Instruction]:
        """The text process has tokenised a prompt, or could not."""
        id = answer.id if isinstance(answer, Encoded) else answer.refusal.id
        attempt = self._attempts.get(id)
        if attempt is None or attempt.prompt_ids is not None:
            return []
        if isinstance(answer, NotEncoded):
            return self._fail(attempt, answer.refusal.reason, answer.refusal.message)
        ids = tuple(attempt.submit.token_ids.ids) or answer.token_ids
        try:
            admission.check_length(len(ids), self._model)
        except PhalanxError as error:
            return self._fail(attempt, error.reason, error.message)
        return self._queue(attempt, ids, answer.bad_words)

    def generated(self, step: Step) -> list[Instruction]:
        """A step of the engine, on its way through the text process."""
        for delta in step.deltas:
            attempt = self._attempts.get(delta.id)
            if attempt is not None and delta.finish is not None:
                attempt.ended_by_engine.add(delta.choice)
                if delta.timing is not None:
                    attempt.timings.append(delta.timing)
        return [ToText(step)]

    def stepped(self, step: Step) -> list[Instruction]:
        """A step of the engine with its text: one frame for every stream that has news."""
        self._step, self._load = step.step, step.load
        todo: list[Instruction] = []
        frames: dict[int, shard_pb2.StepFrame] = {}
        for id in step.accepted:
            attempt = self._attempts.get(id)
            if attempt is not None:
                frame = self._frame_of(frames, attempt)
                frame.accepted.add(
                    request_id=attempt.submit.request_id,
                    attempt=attempt.submit.attempt,
                    prompt_ids=attempt.prompt_ids or (),
                )
        for delta in step.deltas:
            attempt = self._attempts.get(delta.id)
            if attempt is not None and delta.choice in attempt.live:
                frame = self._frame_of(frames, attempt)
                frame.deltas.append(convert.to_delta(*attempt.key, delta))
                todo += self._advance(attempt, delta)
        for refusal in step.failed:
            attempt = self._attempts.get(refusal.id)
            if attempt is not None:
                frame = self._frame_of(frames, attempt)
                frame.failed.append(convert.to_failed(*attempt.key, refusal.reason, refusal.message))
                todo += self._forget(attempt, refusal.reason)
        return self._send(frames) + todo

    def check_integrity(self) -> None:
        """Assert what must hold between any two events."""
        listed = [attempt for book in self._streams.values() for attempt in book.attempts.values()]
        assert len(listed) == len(self._attempts), "every attempt belongs to one stream"
        for attempt in listed:
            assert self._attempts[attempt.id] is attempt, "an id names one attempt"
            assert attempt.live, "an attempt with no live choice is forgotten"

    def _queue(
        self, attempt: _Attempt, prompt_ids: tuple[int, ...], bad_words: tuple[tuple[int, ...], ...] = ()
    ) -> list[Instruction]:
        attempt.prompt_ids = prompt_ids
        submit = attempt.submit
        prior = convert.prior_ids(submit)
        # Tracked first: the text process must know the choices before their first tokens pass.
        stopping = submit.stopping
        track = Track(attempt.id, submit.n, prior, tuple(stopping.stop), stopping.min_tokens)
        request = convert.to_request(attempt.id, submit, prompt_ids, bad_words)
        return [ToText(track), ToEngine(SubmitRequest(request))]

    def _advance(self, attempt: _Attempt, delta: Delta) -> list[Instruction]:
        """Book the delta, which has been put into a frame."""
        attempt.generated += len(delta.token_ids)
        if delta.finish is None:
            return []
        attempt.live.discard(delta.choice)
        todo: list[Instruction] = []
        if delta.choice not in attempt.ended_by_engine:
            # A stop text ended it: the engine goes on until it is told.
            todo.append(ToEngine(CancelRequest(attempt.id, delta.choice)))
        return todo if attempt.live else todo + self._forget(attempt, "")

    def _fail(self, attempt: _Attempt, reason: str, message: str) -> list[Instruction]:
        """End an attempt between two steps, and tell its gateway."""
        frame = self._frame()
        frame.failed.append(convert.to_failed(*attempt.key, reason, message))
        return [ToGateway(attempt.stream, frame), *self._drop(attempt, reason)]

    def _drop(self, attempt: _Attempt, error: str) -> list[Instruction]:
        """End an attempt here and in the engine."""
        queued = attempt.prompt_ids is not None
        stop: list[Instruction] = [ToEngine(CancelRequest(attempt.id))] if queued else []
        return stop + self._forget(attempt, error)

    def _forget(self, attempt: _Attempt, error: str) -> list[Instruction]:
        del self._attempts[attempt.id]
        if attempt.stream in self._streams:
            del self._streams[attempt.stream].attempts[attempt.key]
        ended = Ended(
            traceparent=attempt.submit.traceparent,
            request_id=attempt.submit.request_id,
            attempt=attempt.submit.attempt,
            prompt_tokens=len(attempt.prompt_ids or ()),
            completion_tokens=attempt.generated,
            timings=tuple(attempt.timings),
            error=error,
        )
        tracked = attempt.prompt_ids is not None
        return [ToText(Forget(attempt.id)), ended] if tracked else [ended]

    def _send(self, frames: dict[int, shard_pb2.StepFrame]) -> list[Instruction]:
        """A step's frames, with one that carries the load alone where it is news."""
        todo: list[Instruction] = []
        for number, stream in self._streams.items():
            stale = stream.load != self._load or self._step - stream.step >= LOAD_EVERY_STEPS
            if number in frames or stale:
                stream.load, stream.step = self._load, self._step
                todo.append(ToGateway(number, frames.get(number) or self._frame()))
        return todo

    def _frame_of(self, frames: dict[int, shard_pb2.StepFrame], attempt: _Attempt) -> shard_pb2.StepFrame:
        frame = frames.get(attempt.stream)
        if frame is None:
            frame = frames[attempt.stream] = self._frame()
        return frame

    def _frame(self) -> shard_pb2.StepFrame:
        return shard_pb2.StepFrame(
            replica=self._replica, epoch=self._epoch, step=self._step, load=convert.to_load(self._load)
        )

    def _refuse(self, stream: int, submit: shard_pb2.Submit, reason: str, message: str) -> Instruction:
        frame = self._frame()
        frame.failed.append(convert.to_failed(submit.request_id, submit.attempt, reason, message))
        return ToGateway(stream, frame)
