"""The requests of one epoch on its leader, as a pure state machine.

Commands of gateways, answers and steps of the text process in; messages to the engine, to the text process
and to gateways out. No sockets, no clock: `now` is an argument, in seconds on the monotonic clock.

Owns: which attempts are live, which stream each belongs to, the load that each gateway was sent last.
Does not own: tokens and KV (the engine), text (the text process), streams (`leader`), timers (`retention`).

The life of an attempt: the text process tokenises its prompt and follows its output from then on; the engine
queues it, and its `Accepted` goes to the gateway; its deltas follow. When its last choice has ended, its
output is retained until the gateway says that it was written to the client, and a little longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from dataplane.shard import admission, convert
from dataplane.shard.admission import ServedModel
from dataplane.shard.attempts import Attempt, Ended, Stream
from dataplane.shard.retention import Retention
from engine.ipc.wire import CancelRequest, Encoded, Forget, Message, NotEncoded, Step, SubmitRequest
from engine.request import Delta, Load
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError

LOAD_EVERY_STEPS = 32


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


Instruction = ToEngine | ToText | ToGateway | Ended


class RequestBook:
    """The state machine."""

    def __init__(self, replica: str, epoch: int, model: ServedModel) -> None:
        self._replica, self._epoch, self._model = replica, epoch, model
        self._streams: dict[int, Stream] = {}
        self._attempts: dict[str, Attempt] = {}  # live ones, by id
        self._retained = Retention()  # all of them, and those that have finished
        self._step = 0
        self._load = Load()

    def __len__(self) -> int:
        """Attempts that are live."""
        return len(self._attempts)

    @property
    def retained(self) -> int:
        """Attempts that are live or whose output is retained."""
        return len(self._retained)

    def join(self, stream: int, incarnation: str = "") -> list[Instruction]:
        """A gateway opened a stream. No other stream of this worker's incarnation has the number `stream`.

        `incarnation` is the gateway's. A gateway that comes back has given up its earlier attempts, even if
        this worker does not know yet that its last stream has ended.
        """
        left = [
            each
            for each in self._retained
            if incarnation
            and each.incarnation == incarnation
            and (each.stream is None or each.id in self._attempts)
        ]
        self._streams[stream] = Stream(incarnation, self._load, self._step)
        return [ToGateway(stream, self._frame()), *self._drop_all(left)]

    def leave(self, stream: int, now: float) -> list[Instruction]:
        """A stream is gone. Its attempts with a resume key go on as orphans, the others end. Idempotent."""
        left = self._streams.pop(stream, None)
        if left is None:
            return []
        for attempt in left.attempts.values():
            attempt.stream = None
            if attempt.submit.resume_key:
                self._retained.keep(attempt, now)
        return self._drop_all([each for each in left.attempts.values() if not each.submit.resume_key])

    def end(self) -> list[Instruction]:
        """The epoch is over, and with it every attempt."""
        return self._drop_all(list(self._retained))

    def submit(self, stream: int, submit: shard_pb2.Submit, now: float) -> list[Instruction]:
        """Start an attempt. Does nothing if it is live already; refuses it if it was cancelled."""
        mine, key = self._streams[stream], (submit.request_id, submit.attempt)
        if key in mine.attempts:
            return []
        if key in mine.tombstones:
            return [self._refuse(stream, submit, "CANCELLED", "the attempt was cancelled before it came")]
        try:
            admission.admit(submit, self._model)
        except PhalanxError as error:
            return [self._refuse(stream, submit, error.reason, error.message)]
        outputs = list(submit.prior) or [shard_pb2.Delta(choice=choice) for choice in range(submit.n)]
        attempt = Attempt(
            id=f"{stream}/{submit.request_id}/{submit.attempt}",
            stream=stream,
            incarnation=mine.incarnation,
            submit=submit,
            deadline=now + submit.deadline_ms / 1000 if submit.deadline_ms else None,
            live={choice for choice, output in enumerate(outputs) if not output.finish_reason},
            outputs=outputs,
        )
        # An earlier attempt of the request may still run here, for a gateway that has lost the client.
        before = self._retained.get(attempt.name)
        if before is not None and before.submit.takeovers > submit.takeovers:
            return [self._refuse(stream, submit, "TAKEN_OVER", "the client has gone to another gateway")]
        dropped = [] if before is None else self._displace(before, stream) + self._drop(before, "CANCELLED")
        mine.attempts[key] = self._attempts[attempt.id] = attempt
        self._retained.add(attempt)
        return [*dropped, ToText(attempt.to_encode(self._model))]

    def attach(self, stream: int, attach: shard_pb2.Attach, now: float) -> list[Instruction]:
        """A gateway asks for a request that another gateway began."""
        attempt, frame = self._retained.get(attach.resume_key), self._frame()
        if attempt is None or not attempt.known_prompt_ids or not attempt.submit.resume_key:
            message = "this replica does not hold the request"
            frame.failed.append(convert.to_failed("", attach.attempt, "UNKNOWN_REQUEST", message))
            return [ToGateway(stream, frame)]
        todo = self._displace(attempt, stream)
        mine = self._streams[stream]
        attempt.stream, attempt.incarnation, attempt.submit.attempt = stream, mine.incarnation, attach.attempt
        attempt.submit.takeovers += 1
        if attempt.id in self._attempts:
            attempt.keep_until = None
            mine.attempts[attempt.key] = attempt
        else:
            self._retained.keep(attempt, now)
        frame.attached.add(attempt=attach.attempt, request=attempt.to_replay(self._model, now))
        return [*todo, ToGateway(stream, frame)]

    def ack(self, resume_key: str, now: float) -> list[Instruction]:
        """The last output of a finished request was written to its client. Idempotent."""
        attempt = self._retained.get(resume_key)
        if attempt is not None and attempt.id not in self._attempts and attempt.keep_until is not None:
            self._retained.acked(attempt, now)
        return []

    def cancel(self, stream: int, request_id: str, attempt: int) -> list[Instruction]:
        """End an attempt, or remember that it must not start. Idempotent."""
        mine, key = self._streams[stream], (request_id, attempt)
        mine.bury(key)
        live = mine.attempts.get(key)
        return [] if live is None else self._drop(live, "CANCELLED")

    def expire(self, now: float) -> list[Instruction]:
        """End every attempt whose deadline has passed, and drop every one that was retained long enough."""
        todo: list[Instruction] = []
        frames: dict[int, shard_pb2.StepFrame] = {}
        reason, message = "DEADLINE_EXCEEDED", "the request's deadline has passed"
        for attempt in self._retained.due(now):
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
        return self._retained.next_timer()

    def encoded(self, answer: Encoded | NotEncoded) -> list[Instruction]:
        """The text process follows a request from now on and has tokenised its prompt, or could not."""
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
        attempt.prompt_ids = ids
        return [ToEngine(SubmitRequest(attempt.to_request(answer.bad_words)))]

    def stepped(self, step: Step, now: float) -> list[Instruction]:
        """A step of the engine with its text: one frame for every stream that has something new."""
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
                new_tokens = convert.to_delta(*attempt.key, delta)
                if attempt.submit.resume_key:  # without one, no gateway can ask for the output
                    convert.extend(attempt.outputs[delta.choice], new_tokens)
                if frame := self._frame_of(frames, attempt):
                    frame.deltas.append(new_tokens)
                todo += self._advance(attempt, delta, now)
        for refusal in step.failed:
            attempt = self._attempts.get(refusal.id)
            if attempt is not None:
                if frame := self._frame_of(frames, attempt):
                    frame.failed.append(convert.to_failed(*attempt.key, refusal.reason, refusal.message))
                todo += self._forget(attempt, refusal.reason)
        return self._send(frames) + todo

    def heartbeat(self) -> list[Instruction]:
        """A frame for every stream: this process runs, even if its engine hangs."""
        return [ToGateway(stream, self._frame()) for stream in self._streams]

    def check_integrity(self) -> None:
        """Assert the invariants that hold between any two events."""
        listed = [attempt for stream in self._streams.values() for attempt in stream.attempts.values()]
        orphans = [attempt for attempt in self._attempts.values() if attempt.stream is None]
        assert len(listed) + len(orphans) == len(self._attempts), "every attempt has one stream, or none"
        for attempt in listed:
            assert self._attempts[attempt.id] is attempt, "an id names one attempt"
        for attempt in self._attempts.values():
            assert attempt.live, "an attempt with no live choice is over"
            assert self._retained.get(attempt.name) is attempt, "a live attempt is retained"
            assert (attempt.keep_until is None) == (attempt.stream is not None), "an orphan has its time"
        for attempt in self._retained:
            assert attempt.id in self._attempts or attempt.keep_until is not None, "nothing is kept for ever"

    def _displace(self, attempt: Attempt, stream: int) -> list[Instruction]:
        """Take a live attempt from the stream that has it: another stream's gateway has the client now."""
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

    def _advance(self, attempt: Attempt, delta: Delta, now: float) -> list[Instruction]:
        """Update the attempt by a delta that is in a frame already."""
        todo: list[Instruction] = []
        if attempt.advance(delta):
            todo.append(ToEngine(CancelRequest(attempt.id, delta.choice)))
        if not attempt.live:
            todo += self._forget(attempt, "")
            if attempt.submit.resume_key:
                self._retained.keep(attempt, now)
        return todo

    def _fail(self, attempt: Attempt, reason: str, message: str) -> list[Instruction]:
        """End an attempt between two steps, and tell its gateway."""
        todo = self._drop(attempt, reason)
        if attempt.stream is not None:
            frame = self._frame()
            frame.failed.append(convert.to_failed(*attempt.key, reason, message))
            todo.insert(0, ToGateway(attempt.stream, frame))
        return todo

    def _drop_all(self, attempts: list[Attempt]) -> list[Instruction]:
        return [todo for attempt in attempts for todo in self._drop(attempt, "CANCELLED")]

    def _drop(self, attempt: Attempt, error: str) -> list[Instruction]:
        """End an attempt here and in the engine, in whatever state it is."""
        if attempt.id not in self._attempts:
            self._retained.remove(attempt)
            return []
        queued = attempt.prompt_ids is not None
        stop: list[Instruction] = [ToEngine(CancelRequest(attempt.id))] if queued else []
        return stop + self._forget(attempt, error)

    def _forget(self, attempt: Attempt, error: str) -> list[Instruction]:
        """Remove an attempt that the engine does not run, or that the caller cancels there."""
        del self._attempts[attempt.id]
        self._retained.remove(attempt)
        if attempt.stream is not None and attempt.stream in self._streams:
            del self._streams[attempt.stream].attempts[attempt.key]
        return [ToText(Forget(attempt.id)), attempt.to_ended(error)]

    def _send(self, frames: dict[int, shard_pb2.StepFrame]) -> list[Instruction]:
        """A step's frames. A stream without one gets a frame with the load alone if its last load is old."""
        todo: list[Instruction] = []
        for number, stream in self._streams.items():
            stale = stream.load != self._load or self._step - stream.step >= LOAD_EVERY_STEPS
            if number in frames or stale:
                stream.load, stream.step = self._load, self._step
                todo.append(ToGateway(number, frames.get(number) or self._frame()))
        return todo

    def _frame_of(
        self, frames: dict[int, shard_pb2.StepFrame], attempt: Attempt
    ) -> shard_pb2.StepFrame | None:
        """The frame for an attempt's stream; None for an orphan."""
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
