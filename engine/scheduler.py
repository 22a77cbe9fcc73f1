"""Decides what each step computes: continuous batching with chunked prefill.

Owns: every live sequence, which of them run and which wait, their KV blocks and handles, and the plans
in flight.
Does not own: the model, the clock (`now` is an argument), or the order in which ranks execute plans,
which is the order of their numbers.

A choice of a request is a sequence. Its tokens are the prompt, prior output and new output; a step
computes the next few of them, and the one that computes the last draws the next. So prefill, decode
and recomputation after a preemption are the same thing. A sequence is in at most one plan in flight.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from engine.blocks import BlockPool, blocks_for
from engine.errors import EngineError, RequestError
from engine.grammar import Follow, Matcher
from engine.plan import Join, Mask, Row, Sampled, StepPlan, join
from engine.request import Delta, FinishReason, Load, PositionLogprobs, Request, Timing
from engine.validation import Limits, validate


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request. `computed` tokens have their KV; `handle` is None while it waits."""

    request: Request
    choice: int
    arrival: int
    queued: float
    output: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    handle: int | None = None
    in_flight: bool = False
    cancelled: bool = False
    scheduled: float | None = None
    first_token: float | None = None
    matcher: Matcher | None = None
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.request.prompt_ids) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens known whose KV is not computed; 1 while it decodes."""
        return self.length - self.computed

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """The tokens at positions `start` to `end`."""
        prompt = self.request.prompt_ids
        split = len(prompt)
        return prompt[start:end] + tuple(self.output[max(start - split, 0) : max(end - split, 0)])


class Scheduler:
    """Up to `depth` plans in flight; blocks for `limits.kv_blocks` times `limits.block_size` tokens."""

    def __init__(self, limits: Limits, *, epoch: int = 1, depth: int = 1) -> None:
        self._limits = limits
        self._epoch = epoch
        self._depth = depth
        self._step = 0
        self._arrivals = 0
        self._pool = BlockPool(limits.kv_blocks)
        self._handles = list(range(limits.max_running - 1, -1, -1))
        self._waiting: deque[Sequence] = deque()  # oldest first; all younger than any running
        self._running: list[Sequence] = []  # oldest first
        self._live: dict[str, list[Sequence]] = {}
        self._in_flight: deque[tuple[StepPlan, list[Sequence]]] = deque()
        self._leaves: list[int] = []  # handles to give up in the next plan

    @property
    def has_work(self) -> bool:
        """Whether a sequence lives or a plan is in flight."""
        return bool(self._live or self._in_flight)

    @property
    def plans_in_flight(self) -> int:
        """Plans whose results have not been applied."""
        return len(self._in_flight)

    @property
    def load(self) -> Load:
        """How busy the replica is."""
        return Load(len(self._running), len(self._waiting), self._pool.free, self._pool.size)

    def submit(self, request: Request, now: float, follow: Follow | None = None) -> tuple[Delta, ...]:
        """Queue a request. Choices whose prior output has ended already finish at once.

        `follow` makes the matchers of a request with a grammar.

        Raises:
            RequestError: the request cannot be served; nothing has changed.
        """
        validate(request, self._limits)
        if request.id in self._live:
            raise RequestError("DUPLICATE_REQUEST", f"request {request.id} is live already")
        if request.max_tokens == 0:
            request = replace(request, max_tokens=self._limits.max_model_len - len(request.prompt_ids))
        matchers: list[Matcher | None] = [None] * request.n
        if follow is not None:
            matchers = [follow(request.prior[choice] if request.prior else ()) for choice in range(request.n)]
        deltas = []
        for choice in range(request.n):
            if request.finished and request.finished[choice]:
                continue
            prior = request.prior[choice] if request.prior else ()
            sequence = Sequence(request, choice, self._arrivals, now, list(prior))
            self._arrivals += 1
            sequence.matcher = matchers[choice]
            if prior and (finish := self._finish_reason(sequence)):
                timing = Timing(now, now, now, now)
                deltas.append(Delta(request.id, choice, len(prior), (), finish=finish, timing=timing))
                continue
            self._waiting.append(sequence)
            self._live.setdefault(request.id, []).append(sequence)
        return tuple(deltas)

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Forget a request or one choice of it; unknown ones are ignored."""
        for sequence in list(self._live.get(request_id, ())):
            if choice is None or sequence.choice == choice:
                sequence.cancelled = True
                self._remove(sequence)

    def schedule(self, now: float) -> StepPlan | None:
        """The next plan, or None when `depth` plans are in flight or nothing can be computed now.

        Tokens of sequences that decode come first, so that a long prompt never holds them up; the rest
        of the budget goes to prefills, oldest first.
        """
        if len(self._in_flight) == self._depth:
            return None
        budget = self._limits.max_batch_tokens
        joins: list[Join] = []
        rows: list[Row] = []
        planned: list[Sequence] = []
        masks: list[Mask] = []
        may_admit = True

        def plan(sequence: Sequence, count: int) -> None:
            nonlocal budget
            end = sequence.computed + count
            new_blocks = self._grow(sequence, end)
            sample = end == sequence.length
            tokens = sequence.tokens(sequence.computed, end)
            rows.append(Row(_handle(sequence), sequence.computed, tokens, new_blocks, sample))
            planned.append(sequence)
            if sample and sequence.matcher is not None:
                masks.append(Mask(_handle(sequence), sequence.matcher.mask()))
            sequence.in_flight = True
            budget -= count

        # With several plans in flight each takes its share of the sequences, or the pipeline is serial.
        share = blocks_for(len(self._running), self._depth)
        ready = [sequence for sequence in self._running if not sequence.in_flight]
        for sequence in sorted(ready, key=lambda sequence: sequence.remaining > 1):
            if budget == 0 or len(rows) == share:
                may_admit = False
                break
            if sequence.handle is None:  # preempted by an older one in this loop
                continue
            count = min(sequence.remaining, budget)
            if self._make_room(sequence, sequence.computed + count):
                plan(sequence, count)
            else:
                may_admit = False

        # Nobody is admitted past a running sequence that may lack blocks, or it might lack them for ever.
        while self._waiting and self._handles and budget > 0 and may_admit:
            sequence = self._waiting[0]
            if blocks_for(sequence.length, self._limits.block_size) > self._pool.free:
                break
            joins.append(self._admit(sequence, now))
            plan(sequence, min(sequence.remaining, budget))

        if not rows:
            if self._live and not self._in_flight:
                raise EngineError("INTERNAL", "the scheduler cannot go on although sequences live")
            return None
        self._step += 1
        result = StepPlan(
            self._epoch, self._step, tuple(self._leaves), tuple(joins), tuple(rows), tuple(masks)
        )
        self._leaves.clear()
        self._in_flight.append((result, planned))
        return result

    def apply(self, sampled: Sampled, now: float) -> tuple[Delta, ...]:
        """Take in what the oldest plan in flight drew; returns the new tokens."""
        plan, planned = self._in_flight.popleft()
        if sampled.step != plan.step:
            raise EngineError("INTERNAL", f"results of step {sampled.step}, expected {plan.step}")
        drawn = iter(zip(sampled.token_ids, sampled.logprobs, strict=True))
        deltas = []
        for prompt in sampled.prompt_logprobs:
            planned[prompt.row].prompt_logprobs += prompt.positions
        for row, sequence in zip(plan.rows, planned, strict=True):
            token = next(drawn) if row.sample else None
            sequence.in_flight = False
            if sequence.cancelled:
                continue
            sequence.computed += len(row.token_ids)
            if token is not None:
                deltas.append(self._append(sequence, *token, now))
        return tuple(deltas)

    def check_integrity(self) -> None:
        """See that the books agree. Raises AssertionError."""
        live = [sequence for sequences in self._live.values() for sequence in sequences]
        assert {id(s) for s in live} == {id(s) for s in [*self._running, *self._waiting]}
        assert len(live) == len(self._running) + len(self._waiting)
        self._pool.check_integrity([sequence.blocks for sequence in self._running])
        arrivals = [sequence.arrival for sequence in [*self._running, *self._waiting]]
        assert arrivals == sorted(arrivals), "a younger sequence has overtaken an older one"
        handles = [_handle(sequence) for sequence in self._running]
        assert sorted(handles + self._handles) == list(range(self._limits.max_running))
        for sequence in self._running:
            assert sequence.remaining > 0, "nothing is left to compute"
            assert len(sequence.blocks) * self._limits.block_size >= sequence.computed
        for sequence in self._waiting:
            assert sequence.handle is None
            assert not sequence.blocks
            assert sequence.computed == 0
            assert not sequence.in_flight
        planned = [s for _, sequences in self._in_flight for s in sequences]
        assert len({id(s) for s in planned}) == len(planned), "a sequence is in two plans in flight"
        for sequence in live:
            assert sequence.in_flight == any(sequence is other for other in planned)

    def _append(self, sequence: Sequence, token: int, logprobs: PositionLogprobs | None, now: float) -> Delta:
        index = len(sequence.output)
        sequence.output.append(token)
        if sequence.matcher is not None:
            sequence.matcher.accept(token)
        if sequence.first_token is None:
            sequence.first_token = now
        finish = self._finish_reason(sequence)
        prompt_logprobs, sequence.prompt_logprobs = tuple(sequence.prompt_logprobs), []
        timing = None
        if finish:
            self._remove(sequence)
            scheduled = now if sequence.scheduled is None else sequence.scheduled
            timing = Timing(sequence.queued, scheduled, sequence.first_token, now)
        return Delta(
            sequence.request.id,
            sequence.choice,
            index,
            (token,),
            logprobs=() if logprobs is None else (logprobs,),
            finish=finish,
            timing=timing,
            prompt_logprobs=prompt_logprobs,
        )

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        request, last = sequence.request, sequence.output[-1]
        if last in request.stop_token_ids:
            return "stop"
        if last in self._limits.eos_token_ids and not request.ignore_eos:
            return "stop"
        if sequence.matcher is not None and sequence.matcher.finish is not None:
            return sequence.matcher.finish
        return "length" if len(sequence.output) >= request.max_tokens else None

    def _admit(self, sequence: Sequence, now: float) -> Join:
        self._waiting.popleft()
        self._running.append(sequence)
        sequence.handle = self._handles.pop()
        if sequence.scheduled is None:
            sequence.scheduled = now
        return join(
            sequence.request, sequence.choice, sequence.output, sequence.handle, self._limits.eos_token_ids
        )

    def _make_room(self, sequence: Sequence, end: int) -> bool:
        """Preempt the youngest sequences until blocks for `end` tokens can be taken, or none at all.

        Only the youngest gives way, or it would overtake whoever did: while it is in flight, nobody does.
        Then results follow, so that whoever lacks blocks never waits for ever.
        """
        lacking = blocks_for(end, self._limits.block_size) - len(sequence.blocks) - self._pool.free
        victims: list[Sequence] = []
        for youngest in reversed(self._running):
            if lacking <= 0:
                break
            if youngest is sequence or youngest.in_flight:
                return False
            victims.append(youngest)
            lacking -= len(youngest.blocks)
        for victim in victims:
            self._preempt(victim)
        return True

    def _grow(self, sequence: Sequence, end: int) -> tuple[int, ...]:
        blocks = self._pool.take(blocks_for(end, self._limits.block_size) - len(sequence.blocks))
        sequence.blocks.extend(blocks)
        return tuple(blocks)

    def _preempt(self, sequence: Sequence) -> None:
        """Give up the youngest running sequence's KV, not its tokens: it will be recomputed."""
        self._vacate(sequence)
        sequence.computed = 0
        sequence.prompt_logprobs.clear()  # they come again
        self._waiting.appendleft(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        handle = _handle(sequence)
        self._running.remove(sequence)
        self._leaves.append(handle)
        self._handles.append(handle)
        self._pool.release(sequence.blocks)
        sequence.handle = None
        sequence.blocks = []

    def _remove(self, sequence: Sequence) -> None:
        """The end of a sequence, wherever it is."""
        if sequence.handle is None:
            self._waiting.remove(sequence)
        else:
            self._vacate(sequence)
        siblings = self._live[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request.id]


def _handle(sequence: Sequence) -> int:
    if sequence.handle is None:
        raise EngineError("INTERNAL", "a sequence that does not run has no handle")
    return sequence.handle
