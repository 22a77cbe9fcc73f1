"""The requests of one epoch on its leader, as a pure state machine.

Commands of gateways, steps of the engine and answers of the text process in; messages to all three out.
No sockets, no clock: `now` is an argument, in seconds on the monotonic clock.

Owns: which attempts are live, which stream each belongs to, what each stream has been told, and what the
attempts have generated.
Does not own: tokens and KV (the engine), text (the text process), streams (`leader`).

The life of an attempt: tokenised, unless its ids are given; tracked by the text process; queued in the
engine; accepted; its deltas passed up. When its last choice has ended, its output is retained until its
gateway says that it was written to the client, and a little longer. An attempt whose stream breaks goes on
as an orphan: its gateway may be dead, and another may ask for it by its resume key. What nobody asks for is
dropped after `RETENTION_S`.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass, field

from dataplane.shard import admission, convert
from dataplane.shard.admission import ServedModel
from engine.ipc.wire import (
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
from engine.request import Delta, Load, Timing
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError

LOAD_EVERY_STEPS = 32
RETENTION_S = 30.0
ACKED_S = 5.0  # what was written may have been lost with its gateway: a client that comes back comes soon
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
    """One gateway's stream and what it was told last. `boot` is the gateway's incarnation."""

    boot: str
    load: Load = field(default_factory=Load)
    step: int = 0
    attempts: dict[tuple[str, int], _Attempt] = field(default_factory=dict)
    tombstones: OrderedDict[tuple[str, int], None] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class _Attempt:
    id: str
    stream: int | None  # None: its stream has broken
    boot: str  # of the gateway that has it, or had it last
    submit: shard_pb2.Submit
    deadline: float | None
    live: set[int]  # choices that have not ended, as the gateway knows
    outputs: list[shard_pb2.Delta]  # one per choice: all that has been generated, if it can be asked for
    keep_until: float | None = None  # set while nobody has it, and when it has finished
    prompt_ids: tuple[int, ...] | None = None  # None while it is tokenised
    ended_by_engine: set[int] = field(default_factory=set)
    generated: int = 0
    timings: list[Timing] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        return self.submit.request_id, self.submit.attempt

    @property
    def name(self) -> str:
        """What it is held under: its resume key, which no two requests share."""
        return self.submit.resume_key or self.id


class RequestBook:
    """The state machine."""

    def __init__(self, replica: str, epoch: int, model: ServedModel) -> None:
        self._replica, self._epoch, self._model = replica, epoch, model
        self._streams: dict[int, _Stream] = {}
        self._attempts: dict[str, _Attempt] = {}  # live ones, by id
        self._held: dict[str, _Attempt] = {}  # by name: all of them, and those retained
        self._timers: list[
            tuple[float, str, str]
        ] = []  # a heap of time, name, id; those gone are passed over
        self._step = 0
        self._load = Load()

    def __len__(self) -> int:
        """Attempts that are live."""
        return len(self._attempts)

    def join(self, stream: int, boot: str = "") -> list[Instruction]:
        """A gateway opened a stream. `stream` is a number that no stream of this boot had before.

        `boot` is the gateway's incarnation. One that comes back has given up what it had here before,
        also where the end of its last stream is not known here yet.
        """
        left = [
            held
            for held in self._held.values()
            if boot and held.boot == boot and (held.stream is None or held.id in self._attempts)
        ]
        self._streams[stream] = _Stream(boot, self._load, self._step)
        return [ToGateway(stream, self._frame()), *self._drop_all(left)]

    def leave(self, stream: int, now: float) -> list[Instruction]:
        """A stream is gone. What can be asked for by another gateway goes on. Idempotent."""
        left = self._streams.pop(stream, None)
        if left is None:
            return []
        for attempt in left.attempts.values():
            attempt.stream = None
            if attempt.submit.resume_key:
                self._keep(attempt, now)
        return self._drop_all([one for one in left.attempts.values() if not one.submit.resume_key])

    def end(self) -> list[Instruction]:
        """The epoch is over, and with it every attempt."""
        return self._drop_all(list(self._held.values()))

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
        outputs = list(submit.prior) or [shard_pb2.Delta(choice=choice) for choice in range(submit.n)]
        attempt = _Attempt(
            id=f"{stream}/{submit.request_id}/{submit.attempt}",
            stream=stream,
            boot=book.boot,
            submit=submit,
            deadline=now + submit.deadline_ms / 1000 if submit.deadline_ms else None,
            live={choice for choice, output in enumerate(outputs) if not output.finish_reason},
            outputs=outputs,
        )
        # An attempt before this one may still run here, for a gateway that has lost it.
        before = self._held.get(attempt.name)
        if before is not None and before.submit.takeovers > submit.takeovers:
            return [self._refuse(stream, submit, "TAKEN_OVER", "the client has gone to another gateway")]
        dropped = [] if before is None else self._oust(before, stream) + self._drop(before, "CANCELLED")
        book.attempts[key] = self._attempts[attempt.id] = self._held[attempt.name] = attempt
        if attempt.deadline is not None:
            heapq.heappush(self._timers, (attempt.deadline, attempt.name, attempt.id))
        return dropped + self._begin(attempt)

    def attach(self, stream: int, attach: shard_pb2.Attach, now: float) -> list[Instruction]:
        """A gateway asks for a request that another had begun."""
        attempt, frame = self._held.get(attach.resume_key), self._frame()
        tokenised = attempt is not None and (attempt.prompt_ids or attempt.submit.token_ids.ids)
        if attempt is None or not tokenised or not attempt.submit.resume_key:
            message = "this replica does not hold the request"
            frame.failed.append(convert.to_failed("", attach.attempt, "UNKNOWN_REQUEST", message))
            return [ToGateway(stream, frame)]
        todo = self._oust(attempt, stream)
        book = self._streams[stream]
        attempt.stream, attempt.boot, attempt.submit.attempt = stream, book.boot, attach.attempt
        attempt.submit.takeovers += 1
        if attempt.id in self._attempts:
            attempt.keep_until = None
            book.attempts[attempt.key] = attempt
        else:
            self._keep(attempt, now)
        frame.attached.add(attempt=attach.attempt, request=self._as_replay(attempt, now))
        return [*todo, ToGateway(stream, frame)]

    def ack(self, resume_key: str, now: float) -> list[Instruction]:
        """All of a finished request was written to its client, which need not have got it. Idempotent."""
        attempt = self._held.get(resume_key)
        if attempt is None or attempt.id in self._attempts or attempt.keep_until is None:
            return []
        attempt.keep_until = min(attempt.keep_until, now + ACKED_S)
        heapq.heappush(self._timers, (attempt.keep_until, attempt.name, attempt.id))
        return []

    def cancel(self, stream: int, request_id: str, attempt: int) -> list[Instruction]:
        """End an attempt, or remember that it must not start. Idempotent."""
        book, key = self._streams[stream], (request_id, attempt)
        book.tombstones[key] = None
        if len(book.tombstones) > MAX_TOMBSTONES:
            book.tombstones.popitem(last=False)
        live = book.attempts.get(key)
        return [] if live is None else self._drop(live, "CANCELLED")

    def expire(self, now: float) -> list[Instruction]:
        """End every attempt whose deadline has passed, and what nobody has asked for."""
        todo: list[Instruction] = []
        frames: dict[int, shard_pb2.StepFrame] = {}
        reason, message = "DEADLINE_EXCEEDED", "the request's deadline has passed"
        while self._timers and self._timers[0][0] <= now:
            attempt = self._timed(heapq.heappop(self._timers))
            if attempt is None:
                continue
            live = attempt.id in self._attempts
            if live and attempt.deadline is not None and attempt.deadline <= now:
                if frame := self._frame_of(frames, attempt):
                    frame.failed.append(convert.to_failed(*attempt.key, reason, message))
                todo += self._drop(attempt, reason)
            elif attempt.keep_until is not None and attempt.keep_until <= now:
                todo += self._drop(attempt, "CANCELLED")
        return [*(ToGateway(stream, frame) for stream, frame in frames.items()), *todo]

    def next_timer(self) -> float | None:
        """When `expire` should be called next."""
        while self._timers and self._timed(self._timers[0]) is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

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

    def stepped(self, step: Step, now: float) -> list[Instruction]:
        """A step of the engine with its text: one frame for every stream that has news."""
        self._step, self._load = step.step, step.load
        todo: list[Instruction] = []
        frames: dict[int, shard_pb2.StepFrame] = {}
        for id in step.accepted:
            attempt = self._attempts.get(id)
            if attempt is not None and (frame := self._frame_of(frames, attempt)):
                frame.accepted.add(
                    request_id=attempt.submit.request_id,
                    attempt=attempt.submit.attempt,
                    prompt_ids=attempt.prompt_ids or (),
                )
        for delta in step.deltas:
            attempt = self._attempts.get(delta.id)
            if attempt is not None and delta.choice in attempt.live:
                news = convert.to_delta(*attempt.key, delta)
                if attempt.submit.resume_key:  # otherwise nobody can ask for it
                    convert.extend(attempt.outputs[delta.choice], news)
                if frame := self._frame_of(frames, attempt):
                    frame.deltas.append(news)
                todo += self._advance(attempt, delta, now)
        for refusal in step.failed:
            attempt = self._attempts.get(refusal.id)
            if attempt is not None:
                if frame := self._frame_of(frames, attempt):
                    frame.failed.append(convert.to_failed(*attempt.key, refusal.reason, refusal.message))
                todo += self._forget(attempt, refusal.reason)
        return self._send(frames) + todo

    def beat(self) -> list[Instruction]:
        """A frame for every stream: this process lives, whatever its engine does."""
        return [ToGateway(stream, self._frame()) for stream in self._streams]

    def check_integrity(self) -> None:
        """Assert what must hold between any two events."""
        listed = [attempt for book in self._streams.values() for attempt in book.attempts.values()]
        orphans = [attempt for attempt in self._attempts.values() if attempt.stream is None]
        assert len(listed) + len(orphans) == len(self._attempts), "every attempt has one stream, or none"
        for attempt in listed:
            assert self._attempts[attempt.id] is attempt, "an id names one attempt"
        for attempt in self._attempts.values():
            assert attempt.live, "an attempt with no live choice is forgotten"
            assert self._held.get(attempt.name) is attempt, "what is live is held"
            assert (attempt.keep_until is None) == (attempt.stream is not None), "orphans have their time"
        for attempt in self._held.values():
            assert attempt.id in self._attempts or attempt.keep_until is not None, "nothing is held for ever"

    def _begin(self, attempt: _Attempt) -> list[Instruction]:
        """Tokenise what is to be tokenised, and queue what needs none of it."""
        submit = attempt.submit
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

    def _as_replay(self, attempt: _Attempt, now: float) -> shard_pb2.Submit:
        """The request as a gateway would send it if this replica died now."""
        replay = shard_pb2.Submit()
        replay.CopyFrom(attempt.submit)
        ids = attempt.prompt_ids or tuple(attempt.submit.token_ids.ids)
        replay.token_ids.ids[:] = ids
        replay.stopping.max_tokens = replay.stopping.max_tokens or self._model.max_model_len - len(ids)
        replay.model_hash = self._model.hash
        del replay.prior[:]
        replay.prior.extend(convert.to_prior(output) for output in attempt.outputs)
        replay.deadline_ms = 0 if attempt.deadline is None else max(1, int((attempt.deadline - now) * 1000))
        return replay

    def _oust(self, attempt: _Attempt, stream: int) -> list[Instruction]:
        """Take a live attempt from the stream that has it, if any, for the good of another."""
        had = attempt.stream
        if attempt.id not in self._attempts or had is None:
            return []
        del self._streams[had].attempts[attempt.key]
        attempt.stream, attempt.keep_until = None, 0.0
        if had == stream:
            return []
        frame = self._frame()
        message = "the client has gone to another gateway"
        frame.failed.append(convert.to_failed(*attempt.key, "TAKEN_OVER", message))
        return [ToGateway(had, frame)]

    def _keep(self, attempt: _Attempt, now: float) -> None:
        """Hold what nobody has, for a while."""
        attempt.keep_until = now + RETENTION_S
        heapq.heappush(self._timers, (attempt.keep_until, attempt.name, attempt.id))

    def _timed(self, timer: tuple[float, str, str]) -> _Attempt | None:
        """The attempt that a timer is for, unless it is over."""
        _, name, id = timer
        attempt = self._held.get(name)
        return attempt if attempt is not None and attempt.id == id else None

    def _advance(self, attempt: _Attempt, delta: Delta, now: float) -> list[Instruction]:
        """Book the delta, which has been put into a frame."""
        attempt.generated += len(delta.token_ids)
        if delta.finish is None:
            return []
        attempt.live.discard(delta.choice)
        todo: list[Instruction] = []
        if delta.choice not in attempt.ended_by_engine:
            # A stop text ended it: the engine goes on until it is told.
            todo.append(ToEngine(CancelRequest(attempt.id, delta.choice)))
        if attempt.live:
            return todo
        todo += self._forget(attempt, "")
        if attempt.submit.resume_key:
            self._held[attempt.name] = attempt
            self._keep(attempt, now)
        return todo

    def _fail(self, attempt: _Attempt, reason: str, message: str) -> list[Instruction]:
        """End an attempt between two steps, and tell its gateway."""
        todo = self._drop(attempt, reason)
        if attempt.stream is not None:
            frame = self._frame()
            frame.failed.append(convert.to_failed(*attempt.key, reason, message))
            todo.insert(0, ToGateway(attempt.stream, frame))
        return todo

    def _drop_all(self, attempts: list[_Attempt]) -> list[Instruction]:
        return [todo for attempt in attempts for todo in self._drop(attempt, "CANCELLED")]

    def _drop(self, attempt: _Attempt, error: str) -> list[Instruction]:
        """End an attempt here and in the engine, whatever it is doing."""
        if attempt.id not in self._attempts:
            del self._held[attempt.name]
            return []
        queued = attempt.prompt_ids is not None
        stop: list[Instruction] = [ToEngine(CancelRequest(attempt.id))] if queued else []
        return stop + self._forget(attempt, error)

    def _forget(self, attempt: _Attempt, error: str) -> list[Instruction]:
        del self._attempts[attempt.id]
        del self._held[attempt.name]
        if attempt.stream is not None and attempt.stream in self._streams:
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

    def _frame_of(
        self, frames: dict[int, shard_pb2.StepFrame], attempt: _Attempt
    ) -> shard_pb2.StepFrame | None:
        """The frame of its stream; an orphan has none."""
        if attempt.stream is None:
            return None
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
