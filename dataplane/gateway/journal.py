"""The journal of one live request: what its client has been promised, and what a replay needs.

Owns: the delivered tokens of every choice, the current attempt, the model that the request is pinned to.
Does not own: replicas and routing (`router`, `dispatcher`), the client's connection, clocks.

The order is always: assign an index, journal, write. A token that is in the journal is never asked
for again; a token that is not in it was never shown to anyone by this gateway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dataplane.gateway.resume import Cursor, Ticket
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import types_pb2

FRUITFUL_TOKENS = 8
"""An attempt that is lost after fewer may have been ended by the request itself: a poison."""
UNFINISHED = types_pb2.FINISH_REASON_UNSPECIFIED


@dataclass(slots=True)
class Choice:
    """What has been journalled of one choice; the lists run in step, position by position."""

    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[types_pb2.PositionLogprobs] = field(default_factory=list)
    finish: types_pb2.FinishReason.ValueType = UNFINISHED


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive positions of one choice, ready to be written to a client."""

    choice: int
    index: int
    token_ids: Sequence[int]
    pieces: Sequence[str]
    logprobs: Sequence[types_pb2.PositionLogprobs]
    finish: types_pb2.FinishReason.ValueType
    cursor: Cursor
    prompt_logprobs: Sequence[types_pb2.PositionLogprobs] = ()

    @property
    def text(self) -> str:
        """The text of all its tokens."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Attempt:
    """The try that may append now."""

    number: int
    replica: str
    leader: shard_pb2.LeaderHello
    began_at: int  # tokens journalled when it began


class Journal:
    """A request from `template`: a Submit with everything but attempt, prior output and trace context.

    `model` is the deployment that the client named.
    """

    def __init__(self, model: str, template: shard_pb2.Submit) -> None:
        self.model = model
        self.template = template
        self.choices = [Choice() for _ in range(template.n)]
        self.prompt_ids: Sequence[int] | None = None
        self.model_hash = ""  # pinned at acceptance
        self.replica = ""  # that accepted it last
        self.attempts = 0
        self.attempt: Attempt | None = None
        self.fruitless = 0  # attempts lost in a row that came to next to nothing
        self.error: PhalanxError | None = None
        self.duplicates = 0
        self.cached_tokens: int | None = None  # of the prompt, when the first token came
        self.prompt_logprobs: Sequence[types_pb2.PositionLogprobs] = ()
        self.eos_token_ids: Sequence[int] = ()
        self._budget = 0  # output tokens per choice, known at acceptance

    @classmethod
    def restore(cls, model: str, request: shard_pb2.Submit, eos_token_ids: Sequence[int]) -> Journal:
        """The journal of an accepted request that was begun elsewhere, from what `pinned` said of it.

        `request.prior` is appended; what follows can be as well.
        """
        template = shard_pb2.Submit()
        template.CopyFrom(request)
        for of_an_attempt in ("prior", "attempt", "traceparent", "deadline_ms"):
            template.ClearField(of_an_attempt)
        journal = cls(model, template)
        journal.prompt_ids = tuple(request.token_ids.ids)
        journal.model_hash = request.model_hash
        journal.eos_token_ids = tuple(eos_token_ids)
        journal._budget = request.stopping.max_tokens
        for delta in request.prior:
            journal.append(delta)
        return journal

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.template.request_id

    @property
    def accepted(self) -> bool:
        """Whether a replica has tokenised and queued the request."""
        return self.prompt_ids is not None

    @property
    def length(self) -> int:
        """Tokens that a replica must be able to hold for it; 0 before a replica has tokenised it."""
        return len(self.prompt_ids or ()) + self._budget

    @property
    def finished(self) -> bool:
        """Whether every choice has ended well."""
        return all(choice.finish != UNFINISHED for choice in self.choices)

    @property
    def closed(self) -> bool:
        """Whether nothing more can be appended."""
        return self.finished or self.error is not None

    @property
    def tokens(self) -> int:
        """Tokens journalled over all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def usage(self) -> types_pb2.Usage:
        """What the request has cost; replays count nothing twice."""
        return types_pb2.Usage(
            prompt_tokens=len(self.prompt_ids or ()),
            completion_tokens=self.tokens,
            cached_tokens=self.cached_tokens or 0,
        )

    @property
    def start(self) -> Cursor:
        """The cursor of a client that has seen nothing."""
        return (0,) * len(self.choices)

    @property
    def resume_key(self) -> str:
        """Names the request in the whole cluster; a secret of its client."""
        return self.template.resume_key

    @property
    def ticket(self) -> Ticket:
        """With what its client finds it again, on any gateway."""
        return Ticket(self.resume_key, len(self.choices), self.model)

    # Attempts

    def begin(self, number: int, replica: str, leader: shard_pb2.LeaderHello) -> shard_pb2.Submit:
        """Start the next attempt on a replica; earlier ones may no longer append.

        `number` must be new to this gateway: a leader remembers the attempts that were cancelled, also
        when a client uses a request's id again.
        """
        assert not self.closed
        assert self.attempt is None
        self.attempts += 1
        self.attempt = Attempt(number, replica, leader, self.tokens)
        submit = self.pinned()
        submit.attempt = number
        if self.accepted:
            submit.prior.extend(self.since(self.start))
        if self.prompt_logprobs:
            submit.ClearField("prompt_logprobs")
        return submit

    def adopt(self, number: int, replica: str, leader: shard_pb2.LeaderHello) -> None:
        """An attempt that runs already, begun by another gateway, may append from now on."""
        assert not self.closed
        self.attempts += 1
        self.replica = replica
        self.attempt = Attempt(number, replica, leader, self.tokens)

    def pinned(self) -> shard_pb2.Submit:
        """The request without what was generated: after acceptance, with all that must not change."""
        submit = shard_pb2.Submit()
        submit.CopyFrom(self.template)
        submit.model_hash = self.model_hash
        if self.prompt_ids is not None:
            submit.token_ids.ids[:] = self.prompt_ids
            submit.stopping.max_tokens = self._budget
        return submit

    def since(self, cursor: Cursor) -> list[shard_pb2.Delta]:
        """One delta per choice, with everything journalled from `cursor` on."""
        return [
            shard_pb2.Delta(
                choice=number,
                index=begin,
                token_ids=choice.token_ids[begin:],
                pieces=choice.pieces[begin:],
                logprobs=choice.logprobs[begin:],
                finish_reason=choice.finish,
                prompt_logprobs=self.prompt_logprobs if number == begin == 0 else (),
                cached_tokens=self.cached_tokens or 0,
            )
            for number, (choice, begin) in enumerate(zip(self.choices, cursor, strict=True))
        ]

    def is_current(self, attempt: int) -> bool:
        """Whether an attempt may append."""
        return self.attempt is not None and self.attempt.number == attempt

    def accept(self, prompt_ids: Sequence[int]) -> None:
        """The current attempt's replica has tokenised and queued the request."""
        assert self.attempt is not None
        self.replica = self.attempt.replica
        if self.prompt_ids is None:
            leader = self.attempt.leader
            self.prompt_ids = tuple(prompt_ids)
            self.model_hash = leader.model_hash
            self.eos_token_ids = leader.eos_token_ids
            self._budget = self.template.stopping.max_tokens or leader.max_model_len - len(prompt_ids)

    def append(self, delta: shard_pb2.Delta) -> bool:
        """Journal a delta of the current attempt. Positions that are known already are dropped.

        Returns False, having journalled nothing, when the delta leaves a gap or is not well formed:
        the attempt cannot be trusted further.
        """
        # Each field is asked for once: every token passes here, and asking takes longer than appending.
        token_ids, pieces, logprobs = delta.token_ids, delta.pieces, delta.logprobs
        if delta.choice >= len(self.choices) or len(pieces) != len(token_ids):
            return False
        choice = self.choices[delta.choice]
        known = len(choice.token_ids) - delta.index
        if known < 0 or (logprobs and len(logprobs) != len(token_ids)):
            return False
        if known:
            self.duplicates += min(known, len(token_ids))
        if choice.finish != UNFINISHED:
            return True
        if self.cached_tokens is None and token_ids:
            self.cached_tokens = delta.cached_tokens
        choice.token_ids += token_ids[known:]
        choice.pieces += pieces[known:]
        if logprobs:
            choice.logprobs += logprobs[known:]
        if not self.prompt_logprobs:
            self.prompt_logprobs = delta.prompt_logprobs
        choice.finish = delta.finish_reason
        if choice.finish != UNFINISHED and self.finished:
            self.attempt = None
        return True

    def lose(self, *, blame: bool = True) -> None:
        """The current attempt is lost. Choices that need no further token end here.

        `blame`: the request may have been the cause, so an attempt that came to next to nothing counts
        against it.
        """
        assert self.attempt is not None
        if self.tokens >= self.attempt.began_at + FRUITFUL_TOKENS:
            self.fruitless = 0
        elif blame:
            self.fruitless += 1
        self.attempt = None
        for choice in self.choices:
            if choice.finish == UNFINISHED:
                choice.finish = self._finish_known_here(choice)

    def fail(self, error: PhalanxError) -> None:
        """End the request with an error, unless it has ended."""
        if not self.closed:
            self.error = error
        self.attempt = None

    def _finish_known_here(self, choice: Choice) -> types_pb2.FinishReason.ValueType:
        """The end that the tokens themselves tell; a replay with a budget of 0 must never be sent."""
        stopping = self.template.stopping
        stops = set(stopping.stop_token_ids) | (set() if stopping.ignore_eos else set(self.eos_token_ids))
        if choice.token_ids and choice.token_ids[-1] in stops:
            return types_pb2.FINISH_REASON_STOP
        if self.accepted and len(choice.token_ids) >= self._budget:
            return types_pb2.FINISH_REASON_LENGTH
        return UNFINISHED

    # Clients

    def read(self, cursor: Cursor) -> list[Chunk]:
        """Everything from `cursor` on, one chunk per choice that has news; what piled up is one chunk.

        A choice's finish comes with its last chunk. A client is past it when its cursor is one beyond
        the last token, so that the finish, too, is delivered exactly once.
        """
        chunks = []
        for number, choice in enumerate(self.choices):
            begin = cursor[number]
            end = len(choice.token_ids) + (choice.finish != UNFINISHED)
            if end > begin:
                cursor = (*cursor[:number], end, *cursor[number + 1 :])
                chunks.append(
                    Chunk(
                        number,
                        begin,
                        choice.token_ids[begin:],
                        choice.pieces[begin:],
                        choice.logprobs[begin:],
                        choice.finish,
                        cursor,
                        self.prompt_logprobs if number == begin == 0 else (),
                    )
                )
        return chunks
