"""Decides what each step computes: continuous batching with chunked prefill.

Owns: every live sequence, which of them run, wait or are held back, their slots, and the plans in flight.
Does not own: the model, the clock (`now` is an argument), the blocks (`block_tables`), or the order in which
ranks execute plans, which is the order of their numbers.

A choice of a request is a sequence. Its tokens are the prompt, prior output and new output; a step computes
the next few of them, and the one that computes the last draws the next. So prefill, decode and recomputation
after a preemption are the same thing. A sequence is in at most one plan in flight, or with `limits.ahead` in
the two that there are then: in the second with the token that the first draws, whatever it is. If it ends
with that token, what the second computes of it is dropped.

All sequences stand in one order (`sequence.place_in_order`). Those that decode are served before those
with prompts to compute (`budget` says how many tokens each gets), and both in order. Who lacks blocks
takes them from the last in order. So the first in order always goes on: everyone gets to its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

from engine.errors import EngineError, RequestError
from engine.grammar.matcher import MakeMatcher
from engine.plan import Mask, NewSequence, Sampled, SequenceChunk, StepPlan
from engine.request import Delta, FinishReason, Load, PositionLogprobs, Request, Timing
from engine.scheduling.block_tables import BlockTables, Start
from engine.scheduling.budget import Demand, Share, share_of
from engine.scheduling.sequence import InOrder, Sequence, new_sequence, place_in_order
from engine.scheduling.validation import Limits, validate


@dataclass(slots=True)
class _Draft:
    """A plan while it is made."""

    new_sequences: list[NewSequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    rows: list[SequenceChunk] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    ahead: bool = False  # of results: a plan is in flight
    planned: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Up to `depth` plans in flight; blocks for `limits.kv_blocks` times `limits.block_size` tokens.

    With `limits.ahead`, which goes with a depth of 1, one more.
    """

    def __init__(self, limits: Limits, *, epoch: int = 1, depth: int = 1) -> None:
        if limits.ahead and depth > 1:
            raise ValueError("a pipeline has plans in flight of its own")
        self._limits = limits
        self._epoch = epoch
        self._depth = depth
        self._step = 0
        self._arrivals = 0
        self._tables = BlockTables(limits)
        self._slots = list(range(limits.max_running - 1, -1, -1))
        self._running = InOrder()
        self._waiting = InOrder()
        self._held: dict[str, list[Sequence]] = {}  # waiting until a choice of theirs has computed the prompt
        self._live: dict[str, list[Sequence]] = {}
        self._count = 0  # of live sequences
        self._in_flight: deque[tuple[StepPlan, list[Sequence]]] = deque()
        self._leaves: list[int] = []  # slots to give up in the next plan
        self._prefix_tokens = 0
        self._prefix_hits = 0

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
        running = len(self._running)
        blocks = self._tables.available, self._tables.size
        return Load(running, self._count - running, *blocks, self._prefix_tokens, self._prefix_hits)

    def submit(self, request: Request, now: float, follow: MakeMatcher | None = None) -> tuple[Delta, ...]:
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
        sequences = []
        for choice in range(request.n):
            if request.finished and request.finished[choice]:
                continue
            prior = request.prior[choice] if request.prior else ()
            order = place_in_order(request.priority, self._step, self._arrivals + choice)
            sequence = Sequence(request, choice, order, now, list(prior))
            sequence.matcher = None if follow is None else follow(prior)
            sequences.append(sequence)
        self._arrivals += request.n
        deltas = []
        for sequence in sequences:
            if sequence.output and (finish := self._finish_reason(sequence)):
                index, timing = len(sequence.output), Timing(now, now, now, now)
                deltas.append(Delta(request.id, sequence.choice, index, (), finish=finish, timing=timing))
                continue
            self._waiting.add(sequence)
            self._live.setdefault(request.id, []).append(sequence)
            self._count += 1
        return tuple(deltas)

    def forget_lookups(self) -> None:
        """Count lookups in the prefix cache from here on: those before were nobody's."""
        self._prefix_tokens = self._prefix_hits = 0

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Forget a request or one choice of it; unknown ones are ignored."""
        for sequence in list(self._live.get(request_id, ())):
            if choice is None or sequence.choice == choice:
                self._remove(sequence)

    def schedule(self, now: float) -> StepPlan | None:
        """The next plan, or None when enough are in flight or nothing can be computed now."""
        ahead = len(self._in_flight) >= self._depth
        if ahead and not self._may_plan_ahead():
            return None
        draft = _Draft(ahead=ahead)
        self._displace()
        decodes, prompts, share = self._survey(ahead=ahead)
        left = self._go_on(draft, decodes, share.tokens - share.prompt_tokens)
        left += share.prompt_tokens
        for sequence in prompts:
            left = self._admit_waiting(draft, left, now, before=sequence)
            left = self._go_on(draft, (sequence,), left)
        left = self._admit_waiting(draft, left, now)
        self._go_on(draft, decodes, left)  # what was set aside for prompts, and they could not use
        self._tables.unpin()
        if not draft.rows:
            if self._live and not self._in_flight:
                raise EngineError("INTERNAL", "the scheduler cannot go on although sequences live")
            return None
        self._step += 1
        plan = StepPlan(
            self._epoch,
            self._step,
            tuple(self._leaves),
            tuple(draft.new_sequences),
            tuple(draft.rows),
            tuple(draft.masks),
            tuple(draft.copies),
            self._limits.ahead and all(sequence.plain for sequence in draft.planned),
        )
        self._leaves.clear()
        self._in_flight.append((plan, draft.planned))
        return plan

    def apply(self, sampled: Sampled, now: float) -> tuple[Delta, ...]:
        """Take in what the oldest plan in flight drew; returns the new tokens."""
        plan, planned = self._in_flight.popleft()
        if sampled.step != plan.step:
            raise EngineError("INTERNAL", f"results of step {sampled.step}, expected {plan.step}")
        drawn = iter(zip(sampled.token_ids, sampled.logprobs, strict=True))
        deltas = []
        for prompt in sampled.prompt_logprobs:
            planned[prompt.row].prompt_logprobs += prompt.positions
        for row, sequence in zip(plan.chunks, planned, strict=True):
            token = next(drawn) if row.sample else None
            sequence.in_flight -= len(row.token_ids)
            sequence.drawing -= row.sample
            if sequence.slot is None:  # cancelled or at its end since it was planned
                continue
            self._tables.advance(sequence, len(row.token_ids))
            if self._held and row.start < sequence.prompt_len <= sequence.computed:
                self._let_go(sequence.request.id)
            if token is not None:
                deltas.append(self._append(sequence, *token, now))
        return tuple(deltas)

    def check_integrity(self) -> None:
        """See that the books agree. Raises AssertionError."""
        live = [sequence for sequences in self._live.values() for sequence in sequences]
        running, waiting = list(self._running), list(self._waiting)
        held = [sequence for sequences in self._held.values() for sequence in sequences]
        assert {id(s) for s in live} == {id(s) for s in [*running, *waiting, *held]}
        assert len(live) == self._count == len(running) + len(waiting) + len(held)
        for sequences in (running, waiting):
            assert sequences == sorted(sequences, key=lambda sequence: sequence.order)
        slots = [_slot(sequence) for sequence in running]
        assert sorted(slots + self._slots) == list(range(self._limits.max_running))
        self._tables.check_integrity(running)
        for sequence in live:
            assert sequence.length == sequence.prompt_len + len(sequence.output)
            assert sequence.remaining > 0, "nothing is left to compute"
        for sequence in [*waiting, *held]:
            assert sequence.slot is None
            assert not sequence.blocks
            assert (sequence.computed, sequence.passed, sequence.told) == (0, 0, 0)
            assert (sequence.in_flight, sequence.drawing) == (0, 0)
        for request_id, sequences in self._held.items():
            assert sequences
            assert any(s.slot is not None and s.computed < s.prompt_len for s in self._live[request_id])
        planned: dict[int, list[SequenceChunk]] = {}
        for plan, sequences in self._in_flight:
            for row, sequence in zip(plan.chunks, sequences, strict=True):
                if sequence.slot is not None:
                    planned.setdefault(id(sequence), []).append(row)
        most = 2 if self._limits.ahead else 1
        assert all(len(rows) <= most for rows in planned.values()), (
            "a sequence is in too many plans in flight"
        )
        assert {id(s) for s in live if s.in_flight} == planned.keys()
        for sequence in live:
            rows = planned.get(id(sequence), [])
            assert sequence.in_flight == sum(len(row.token_ids) for row in rows)
            assert sequence.drawing == sum(row.sample for row in rows)

    # Planning

    def _may_plan_ahead(self) -> bool:
        """Whether one plan more may be in flight, in which those go on that are in flight already.

        Not where somebody may have to give way in it: nobody can who is in flight. Then the plans end first.
        """
        if not self._limits.ahead or len(self._in_flight) > self._depth or self._held:
            return False
        plan, _ = self._in_flight[-1]
        if not plan.sample_on_device:
            return False
        if self._waiting and self._running and _is_behind(self._running.last, self._waiting.first):
            return False
        most = self._limits.max_batch_tokens
        lacking = (self._tables.lacking_until(s, s.planned + min(s.unplanned, most)) for s in self._running)
        return sum(max(0, blocks) for blocks in lacking) <= self._tables.available

    def _survey(self, *, ahead: bool) -> tuple[list[Sequence], list[Sequence], Share]:
        """Who decodes and who computes a prompt, and the plan's share for each.

        Of those not in flight, or `ahead` of all, as they are when the plan in flight has run.
        """
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        decoding = reading = all_prompts = ready = in_flight = resumed = 0
        for sequence in self._running:
            free = ahead or not sequence.in_flight
            remaining = sequence.unplanned if ahead else sequence.remaining
            if remaining <= 1:
                decoding += remaining
                if free and remaining:
                    decodes.append(sequence)
                continue
            reading += 1
            resumed += bool(sequence.output)
            all_prompts += remaining
            if free:
                prompts.append(sequence)
                ready += remaining
            else:
                in_flight += sequence.in_flight
        most = self._depth * self._limits.max_batch_tokens
        for sequence in islice(self._waiting, max(1, len(self._slots))):
            if ready >= most:
                break
            ready += sequence.length
            resumed += bool(sequence.output)
            all_prompts += sequence.length
        demand = Demand(
            decoding,
            self._count - len(self._running) + reading,
            all_prompts,
            ready,
            in_flight,
            resumed,
        )
        return decodes, prompts, share_of(self._limits, self._depth, demand)

    def _go_on(self, draft: _Draft, sequences: Iterable[Sequence], tokens: int) -> int:
        """Plan the next tokens of some that run; returns how many are left over."""
        for sequence in sequences:
            if tokens == 0:
                break
            if sequence.step > self._step or sequence.slot is None:  # planned, or preempted, in this plan
                continue
            count = min(sequence.unplanned, tokens)
            if self._room_to_go_on(sequence, sequence.planned + count):
                self._plan(draft, sequence, count)
                tokens -= count
        return tokens

    def _admit_waiting(self, draft: _Draft, tokens: int, now: float, before: Sequence | None = None) -> int:
        """Let those that wait run, in order, until one has no place; returns how many tokens are left.

        With `before`, only those that come before that one.
        """
        while tokens > 0 and self._waiting:
            sequence = self._waiting.first
            if before is not None and sequence.order > before.order:
                break
            if draft.ahead and not sequence.plain:
                break  # its rules would have the step wait for the host
            sibling, held = self._sibling(sequence)
            if held:
                self._waiting.remove(sequence)
                self._held.setdefault(sequence.request.id, []).append(sequence)
                continue
            if not self._slots:
                break
            start = self._tables.start_of(sequence, sibling)
            if not self._fits(sequence, start):
                break
            self._admit(draft, sequence, start, forked=sibling is not None, now=now)
            count = min(sequence.unplanned, tokens)
            self._plan(draft, sequence, count)
            tokens -= count
        return tokens

    def _plan(self, draft: _Draft, sequence: Sequence, count: int) -> None:
        start = sequence.planned
        end = start + count
        slot, blocks = _slot(sequence), self._tables.grow(sequence, end)
        sample = end == sequence.length + sequence.drawing
        draft.rows.append(SequenceChunk(slot, start, sequence.tokens(start, end), blocks, sample))
        draft.planned.append(sequence)
        if sample and sequence.matcher is not None:
            draft.masks.append(Mask(slot, sequence.matcher.mask()))
        sequence.in_flight += count
        sequence.drawing += sample
        sequence.step = self._step + 1

    def _admit(self, draft: _Draft, sequence: Sequence, start: Start, *, forked: bool, now: float) -> None:
        self._waiting.remove(sequence)
        self._running.add(sequence)
        sequence.slot = self._slots.pop()
        copy = self._tables.open(sequence, start)
        if copy is not None:
            draft.copies.append(copy)
        if sequence.scheduled is None:
            sequence.scheduled = now
            sequence.cached_tokens = min(start.computed, sequence.prompt_len)
            if self._limits.prefix_cache and not forked:
                self._prefix_tokens += sequence.prompt_len
                self._prefix_hits += sequence.cached_tokens
        request, eos = sequence.request, self._limits.eos_token_ids
        draft.new_sequences.append(
            new_sequence(request, sequence.choice, sequence.output, sequence.slot, eos)
        )

    def _sibling(self, sequence: Sequence) -> tuple[Sequence | None, bool]:
        """The running choice of the same request that lends its prompt's KV; or whether one computes it."""
        computing = False
        if sequence.request.n == 1 or sequence.prompt_len == 1 or sequence.scores_prompt:
            return None, False
        for sibling in self._live[sequence.request.id]:
            if sibling.slot is None:
                continue
            if sibling.computed < sibling.prompt_len:
                computing = True
            elif self._tables.can_lend(sibling, sequence):
                return sibling, False
        return None, computing

    # Making room

    def _room_to_go_on(self, sequence: Sequence, end: int) -> bool:
        """See that a running sequence can take the blocks for `end` tokens, if need be from those behind it.

        The last in order gives way, and nobody does while it is in flight: then results follow, so that
        whoever lacks blocks never waits for ever.
        """
        lacking = self._tables.lacking_until(sequence, end)
        if lacking <= 0 or lacking <= self._tables.available:
            return True

        def short(victims: list[Sequence]) -> bool:
            gain = self._tables.gain(victims) if victims else 0
            return lacking > self._tables.available + gain

        return self._preempt_while(short, lambda last: last is not sequence and not last.in_flight)

    def _displace(self) -> None:
        """Preempt those of less priority for the first of those that wait, before any of them is planned."""
        if not self._waiting or not self._running:
            return
        first = self._waiting.first

        def may_go(last: Sequence) -> bool:
            return _is_behind(last, first) and not last.in_flight

        if may_go(self._running.last):
            sibling, held = self._sibling(first)
            if not held:
                start = self._tables.start_of(first, sibling)
                self._preempt_while(lambda victims: not self._fits(first, start, victims), may_go)

    def _fits(self, sequence: Sequence, start: Start, without: Iterable[Sequence] = ()) -> bool:
        """Whether there are a slot and blocks for a sequence that waits, perhaps without some that run.

        Blocks that those running lack for the tokens they know by now are theirs.
        """
        victims = list(without)
        if not self._slots and not victims:
            return False
        cost = self._tables.cost(sequence, start) + sum(map(self._tables.lacking, self._running))
        cost -= sum(map(self._tables.lacking, victims))
        return cost <= self._tables.available + self._tables.gain(victims, start.shared)

    def _preempt_while(
        self, short: Callable[[list[Sequence]], bool], may_go: Callable[[Sequence], bool]
    ) -> bool:
        """Preempt as few of the last as it takes, while they may go; nobody in vain."""
        victims: list[Sequence] = []
        candidates = reversed(self._running)
        while short(victims):
            last = next(candidates, None)
            if last is None or not may_go(last):
                return False
            victims.append(last)
        for victim in victims:
            self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Give up a running sequence's KV, not its tokens: what is no longer cached is computed again."""
        self._vacate(sequence)
        sequence.prompt_logprobs.clear()  # they come again
        self._waiting.add(sequence)

    # What becomes of a sequence

    def _append(self, sequence: Sequence, token: int, logprobs: PositionLogprobs | None, now: float) -> Delta:
        index = len(sequence.output)
        sequence.append(token)
        finish = self._finish_reason(sequence)
        prompt_logprobs: tuple[PositionLogprobs, ...] = ()
        cached = 0
        if sequence.first_token is None:
            sequence.first_token = now
            cached = sequence.cached_tokens
            prompt_logprobs = tuple(sequence.prompt_logprobs)
            sequence.prompt_logprobs.clear()
        timing = None
        if finish:
            self._remove(sequence)
            scheduled = now if sequence.scheduled is None else sequence.scheduled
            timing = Timing(sequence.queued, scheduled, sequence.first_token, now)
        entries = () if logprobs is None else (logprobs,)
        return Delta(
            sequence.request.id,
            sequence.choice,
            index,
            (token,),
            (),
            entries,
            finish,
            timing,
            prompt_logprobs,
            cached,
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

    def _let_go(self, request_id: str) -> None:
        """The choices held back for one that computes their prompt wait again like everyone."""
        for sequence in self._held.pop(request_id, ()):
            self._waiting.add(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        slot = _slot(sequence)
        self._running.remove(sequence)
        self._leaves.append(slot)
        self._slots.append(slot)
        self._tables.drop(sequence)
        sequence.slot = None
        self._let_go(sequence.request.id)

    def _remove(self, sequence: Sequence) -> None:
        """The end of a sequence, wherever it is."""
        request_id = sequence.request.id
        if sequence.slot is not None:
            self._vacate(sequence)
        elif sequence in self._held.get(request_id, ()):
            self._held[request_id].remove(sequence)
            if not self._held[request_id]:
                del self._held[request_id]
        else:
            self._waiting.remove(sequence)
        self._count -= 1
        siblings = self._live[request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[request_id]


def _is_behind(running: Sequence, waiting: Sequence) -> bool:
    """Whether one that runs has to give way to one that waits."""
    return running.request.priority > waiting.request.priority and running.order > waiting.order


def _slot(sequence: Sequence) -> int:
    if sequence.slot is None:
        raise EngineError("INTERNAL", "a sequence that does not run has no slot")
    return sequence.slot
