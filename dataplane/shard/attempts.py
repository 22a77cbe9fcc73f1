"""One attempt of a request on its leader, and one gateway's stream: the state that `requests` has of each."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from dataplane.shard import convert
from dataplane.shard.admission import ServedModel
from engine.ipc.wire import Encode
from engine.request import Delta, Load, Request, Timing
from phalanx.internal.v1 import shard_pb2

MAX_TOMBSTONES = 4096  # per stream; a cancel overtakes its Submit by far fewer


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt is over: the facts for its trace. `timings` has one entry per choice that the engine ended.

    `error` is the reason of its failure, CANCELLED included, empty when it finished.
    """

    traceparent: str
    request_id: str
    attempt: int
    prompt_tokens: int
    completion_tokens: int
    timings: tuple[Timing, ...]
    error: str


@dataclass(slots=True)
class Stream:
    """One gateway's stream: its attempts, and the load and step that the gateway last heard of.

    `incarnation` is the gateway's. `tombstones` are attempts that were cancelled: a Submit that comes after
    its cancel must not start.
    """

    incarnation: str
    load: Load = field(default_factory=Load)
    step: int = 0
    attempts: dict[tuple[str, int], Attempt] = field(default_factory=dict)
    tombstones: OrderedDict[tuple[str, int], None] = field(default_factory=OrderedDict)

    def bury(self, key: tuple[str, int]) -> None:
        """Remember that an attempt was cancelled."""
        self.tombstones[key] = None
        if len(self.tombstones) > MAX_TOMBSTONES:
            self.tombstones.popitem(last=False)


@dataclass(slots=True)
class Attempt:
    """One attempt, from its Submit until it is dropped.

    `id` is its name in the engine and the text process. `deadline` and `keep_until` are in seconds on the
    monotonic clock.
    """

    id: str
    stream: int | None  # None: its stream has broken
    incarnation: str  # of the gateway that has the attempt, or had it last
    submit: shard_pb2.Submit
    deadline: float | None
    live: set[int]  # choices whose end has not been sent to the gateway
    outputs: list[shard_pb2.Delta]  # per choice; new output is added only with a resume key
    keep_until: float | None = None  # the end of its retention; set for an orphan and for a finished attempt
    prompt_ids: tuple[int, ...] | None = None  # None until the text process has answered
    completion_tokens: int = 0
    timings: list[Timing] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        """The attempt's name on its stream."""
        return self.submit.request_id, self.submit.attempt

    @property
    def name(self) -> str:
        """Its name among retained attempts: the resume key, which no two requests share, else the id."""
        return self.submit.resume_key or self.id

    @property
    def known_prompt_ids(self) -> tuple[int, ...]:
        """The prompt's ids where they are known: tokenised, or given by the gateway."""
        return self.prompt_ids or tuple(self.submit.token_ids.ids)

    def to_encode(self, model: ServedModel) -> Encode:
        """The message that asks the text process to tokenise the prompt and to follow the output."""
        submit = self.submit
        text, messages = None, ()  # type: str | None, tuple[tuple[str, str], ...]
        if submit.WhichOneof("prompt") == "chat":
            messages = tuple((message.role, message.content) for message in submit.chat.messages)
        elif submit.WhichOneof("prompt") == "text":
            text = submit.text
        return Encode(
            self.id,
            text,
            messages,
            max_model_len=model.max_model_len,
            bad_words=tuple(submit.sampling.bad_words),
            n=submit.n,
            prior=convert.prior_ids(submit),
            stop=tuple(submit.stopping.stop),
            min_tokens=submit.stopping.min_tokens,
        )

    def to_request(self, bad_words: tuple[tuple[int, ...], ...]) -> Request:
        """The engine's request, once the prompt's ids are known."""
        assert self.prompt_ids is not None
        return convert.to_request(self.id, self.submit, self.prompt_ids, bad_words)

    def to_replay(self, model: ServedModel, now: float) -> shard_pb2.Submit:
        """The Submit that a gateway would send if this replica died now."""
        replay = shard_pb2.Submit()
        replay.CopyFrom(self.submit)
        ids = self.known_prompt_ids
        replay.token_ids.ids[:] = ids
        replay.stopping.max_tokens = replay.stopping.max_tokens or model.max_model_len - len(ids)
        replay.model_hash = model.hash
        del replay.prior[:]
        replay.prior.extend(convert.to_prior(output) for output in self.outputs)
        replay.deadline_ms = 0 if self.deadline is None else max(1, int((self.deadline - now) * 1000))
        return replay

    def to_ended(self, error: str) -> Ended:
        """The facts for its trace, now that the attempt is over."""
        return Ended(
            traceparent=self.submit.traceparent,
            request_id=self.submit.request_id,
            attempt=self.submit.attempt,
            prompt_tokens=len(self.prompt_ids or ()),
            completion_tokens=self.completion_tokens,
            timings=tuple(self.timings),
            error=error,
        )

    def advance(self, delta: Delta) -> bool:
        """Count a delta. Returns whether its choice has ended while the engine still generates for it."""
        self.completion_tokens += len(delta.token_ids)
        if delta.finish is None:
            return False
        self.live.discard(delta.choice)
        if delta.timing is None:
            return True  # the text process ended it: only the engine adds a timing
        self.timings.append(delta.timing)
        return False
