"""The journal of one live request: the tokens its client may read, and what a replay needs. Pure.

Owns: the tokens of every choice, the current attempt, the model that the request is pinned to.
Does not own: replicas and routing (`router`, `dispatcher`), the client's connection (`live`), clocks.

A token goes into the journal at its position before it is written to the client. So a replay never asks for a
token that is in the journal, and this gateway has never delivered a token that is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dataplane.gateway.resume import Cursor, Ticket
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import types_pb2

EARLY_TOKENS = 8
"""Attempts lost before this many tokens count toward the poison limit: the request may kill replicas."""
UNFINISHED = types_pb2.FINISH_REASON_UNSPECIFIED


@dataclass(slots=True)
class Choice:
    """One choice's output: entry i of each list is output position i. `logprobs` may be empty."""

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
    """The current attempt: only its deltas may be appended."""

    number: int
    replica: str
    leader: shard_pb2.LeaderHello
    began_at: int  # tokens in the journal when it began


class Journal:
    """The journal of a request for the deployment `model`.

    `template` is its Submit without attempt number, prior output and trace context.
    """

    def __init__(self, model: str, template: shard_pb2.Submit) -> None:
        self.model = model
        self.template = template
        self.choices = [Choice() for _ in range(template.n)]
        self.prompt_ids: Sequence[int] | None = None
        self.model_hash = ""  # pinned at acceptance
        self.replica = ""  # the last one that accepted the request
        self.attempts = 0
        self.attempt: Attempt | None = None
        self.early_losses = 0  # attempts in a row that were lost before EARLY_TOKENS
        self.error: PhalanxError | None = None
        self.duplicates = 0
        self.cached_tokens: int | None = None  # of the prompt; None before the first token
        self.prompt_logprobs: Sequence[types_pb2.PositionLogprobs] = ()
        self.eos_token_ids: Sequence[int] = ()
        self._budget = 0  # output tokens per choice, known at acceptance

    @classmethod
    def restore(cls, model: str, request: shard_pb2.Submit, eos_token_ids: Sequence[int]) -> Journal:
        """The journal of an accepted request that another gateway began.

        `request` is the Submit that `pinned` returned there, with the output so far in `prior`.
        """
        template = shard_pb2.Submit()
        template.CopyFrom(request)
        for attempt_field in ("prior", "attempt", "traceparent", "deadline_ms"):
            template.ClearField(attempt_field)
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
        """Tokens of context that the request needs on a replica; 0 before its prompt is tokenised."""
        return len(self.prompt_ids or ()) + self._budget

    @property
    def finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return all(choice.finish != UNFINISHED for choice in self.choices)

    @property
    def closed(self) -> bool:
        """Whether nothing more can be appended."""
        return self.finished or self.error is not None

    @property
    def tokens(self) -> int:
        """Output tokens in the journal, over all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def usage(self) -> types_pb2.Usage:
        """Token counts of the request. A replay counts no token twice."""
        return types_pb2.Usage(
            prompt_tokens=len(self.prompt_ids or ()),
            completion_tokens=self.tokens,
            cached_tokens=self.cached_tokens or 0,
        )

    @property
    def start(self) -> Cursor:
        """The cursor of a client that has read nothing."""
        return (0,) * len(self.choices)

    @property
    def resume_key(self) -> str:
        """The request's name in the whole cluster. Only its client may learn it."""
        return self.template.resume_key

    @property
    def ticket(self) -> Ticket:
        """The content of the resume token, which finds the request at any gateway."""
        return Ticket(self.resume_key, len(self.choices), self.model)

    # Attempts

    def begin(self, number: int, replica: str, leader: shard_pb2.LeaderHello) -> shard_pb2.Submit:
        """Start the next attempt on a replica; earlier attempts may no longer append.

        No other attempt of this gateway may have the same `number`: a leader remembers cancelled attempts,
        and a client may use a request id again.
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
        """Make an attempt that another gateway began, and that still runs, the current one."""
        assert not self.closed
        self.attempts += 1
        self.replica = replica
        self.attempt = Attempt(number, replica, leader, self.tokens)

    def pinned(self) -> shard_pb2.Submit:
        """The request without its output. After acceptance it fixes prompt ids, token budget and model."""
        submit = shard_pb2.Submit()
        submit.CopyFrom(self.template)
        submit.model_hash = self.model_hash
        if self.prompt_ids is not None:
            submit.token_ids.ids[:] = self.prompt_ids
            submit.stopping.max_tokens = self._budget
        return submit

    def since(self, cursor: Cursor) -> list[shard_pb2.Delta]:
        """One delta per choice, with its output from `cursor` on."""
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
        """Whether this number is the current attempt's."""
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
        """Append a delta of the current attempt. Tokens at positions that it has already are dropped.

        Returns False, and appends nothing, when the delta leaves a gap or is malformed: its replica cannot be
        trusted.
        """
        # The hot path. Read each protobuf field once: reading a field takes longer than appending.
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
        """The current attempt is lost. Choices that need no further token get their finish reason here.

        `blame`: the request may be the cause, so a loss before EARLY_TOKENS counts toward the poison limit.
        """
        assert self.attempt is not None
        if self.tokens >= self.attempt.began_at + EARLY_TOKENS:
            self.early_losses = 0
        elif blame:
            self.early_losses += 1
        self.attempt = None
        for choice in self.choices:
            if choice.finish == UNFINISHED:
                choice.finish = self._implied_finish(choice)

    def fail(self, error: PhalanxError) -> None:
        """End the request with an error, unless it has ended."""
        if not self.closed:
            self.error = error
        self.attempt = None

    def _implied_finish(self, choice: Choice) -> types_pb2.FinishReason.ValueType:
        """The finish reason that follows from the tokens. A replay with no tokens left must never be sent."""
        stopping = self.template.stopping
        stops = set(stopping.stop_token_ids) | (set() if stopping.ignore_eos else set(self.eos_token_ids))
        if choice.token_ids and choice.token_ids[-1] in stops:
            return types_pb2.FINISH_REASON_STOP
        if self.accepted and len(choice.token_ids) >= self._budget:
            return types_pb2.FINISH_REASON_LENGTH
        return UNFINISHED

    # Clients

    def read(self, cursor: Cursor) -> list[Chunk]:
        """Everything from `cursor` on: one chunk for each choice that has something new.

        The finish reason takes the position after the last token. So it, too, is delivered exactly once: with
        the last chunk, after which the cursor is one beyond the last token.
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
