"""Decides what each step computes: continuous batching with chunked prefill.

Owns: which sequences run and wait, their slots, the plans in flight.
Does not own: the model, the clock (`now` is an argument), the KV blocks (`block_tables`), the execution of a
plan (engine/execution/runner.py).

A choice of a request is a sequence. A step computes the next tokens of some sequences. It samples a token for
each sequence whose last known token it computes. So prefill, decode and recomputation after a preemption
are the same operation.

- **Where is a prompt cut into chunks?** In `_schedule_running`: a chunk takes the tokens that the step has
  left. `budget.next_budget` decides how many tokens a step has, and how many of them are for prompts.
- **Who is served first?** Decodes, then prompts, both in priority order (`priority.priority_order`). The
  first running sequence in priority order always makes progress, so every sequence ends.
- **Who is preempted?** The running sequence with the lowest priority: for a running one that lacks blocks
  (`_make_room`), or for a waiting one that outranks it (`_preempt_for_waiting`). `preemption` picks the
  victims. A preempted sequence keeps its output, waits, and is computed again (`_preempt`).
- **What is async scheduling?** A plan is made while the plan before it still runs (`_can_schedule_async`). In
  the later plan a decode continues from `PENDING_TOKEN`, which stands for the token that the earlier plan
  samples. If the sequence ends with that token, the later plan's result for it is dropped (`apply`).
- **What does a sliding window free?** The blocks that no later query reads, after each step (`apply`, in
  `BlockTables.free_blocks_out_of_window`).
- **What do the choices of a request share?** The KV of their prompt (`choices`, `BlockTables.match_prefix`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

from engine.errors import EngineError, RequestError
from engine.grammar.matcher import MakeMatcher
from engine.plan import Sampled, StepPlan
from engine.request import Delta, Load, Request, Timing
from engine.scheduling.block_tables import BlockTables
from engine.scheduling.budget import next_budget
from engine.scheduling.choices import Choices
from engine.scheduling.demand import classify_running, measure_demand
from engine.scheduling.integrity import check_plans_in_flight, check_sequences, check_slots
from engine.scheduling.limits import Limits
from engine.scheduling.plan_draft import PlanDraft, slot_of
from engine.scheduling.preemption import (
    can_preempt,
    has_room_to_start,
    victims_to_continue,
    victims_to_start,
)
from engine.scheduling.prefix_match import PrefixMatch
from engine.scheduling.priority import PriorityQueue, outranks, priority_order
from engine.scheduling.sequence import Sequence
from engine.scheduling.validation import validate


class Scheduler:
    """The scheduler of one replica.

    Args:
        limits: sizes of the KV cache, the running batch and a step.
        epoch: the number that all plans carry.
        depth: the maximum number of plans in flight. With `limits.async_scheduling` it must be 1, and one
            more plan may be in flight.

    Raises:
        ValueError: async scheduling with a depth above 1.
    """

    def __init__(self, limits: Limits, *, epoch: int = 1, depth: int = 1) -> None:
        if limits.async_scheduling and depth > 1:
            raise ValueError("async scheduling needs a depth of 1: a pipeline overlaps its own plans")
        self._limits = limits
        self._epoch = epoch
        self._depth = depth
        self._step = 0  # of the last plan
        self._num_arrivals = 0
        self._tables = BlockTables(limits)
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self._freed_slots: list[int] = []  # since the last plan
        self._running = PriorityQueue()
        self._waiting = PriorityQueue()
        self._choices = Choices(self._tables)
        self._in_flight: deque[tuple[StepPlan, list[Sequence]]] = deque()  # with the sequence of each chunk
        self._prefix_tokens = 0
        self._prefix_hits = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence is live or a plan is in flight."""
        return bool(self._choices.live or self._in_flight)

    @property
    def plans_in_flight(self) -> int:
        """Plans whose results have not been applied."""
        return len(self._in_flight)

    @property
    def load(self) -> Load:
        """How busy the replica is."""
        running = len(self._running)
        blocks = self._tables.num_available_blocks, self._tables.num_blocks
        return Load(
            running, self._choices.num_live - running, *blocks, self._prefix_tokens, self._prefix_hits
        )

    def submit(self, request: Request, now: float, follow: MakeMatcher | None = None) -> tuple[Delta, ...]:
        """Queue a request.

        Args:
            request: its prior output counts as output.
            now: seconds since the Unix epoch.
            follow: makes the matchers of a request with a grammar.

        Returns:
            The end of each choice whose prior output is complete already.

        Raises:
            RequestError: the request cannot be served; nothing has changed.
        """
        validate(request, self._limits)
        if request.id in self._choices.live:
            raise RequestError("DUPLICATE_REQUEST", f"request {request.id} is live already")
        if request.max_tokens == 0:
            request = replace(request, max_tokens=self._limits.max_model_len - len(request.prompt_ids))
        sequences = []
        for choice in range(request.n):
            if request.finished and request.finished[choice]:
                continue
            prior = request.prior[choice] if request.prior else ()
            order = priority_order(request.priority, self._step, self._num_arrivals + choice)
            sequence = Sequence(request, choice, order, now, list(prior))
            sequence.matcher = None if follow is None else follow(prior)
            sequences.append(sequence)
        self._num_arrivals += request.n
        deltas = []
        for sequence in sequences:
            if sequence.output_ids and (finish := sequence.finish_reason(self._limits.eos_token_ids)):
                index, timing = len(sequence.output_ids), Timing(now, now, now, now)
                deltas.append(Delta(request.id, sequence.choice, index, (), finish=finish, timing=timing))
                continue
            self._waiting.add(sequence)
            self._choices.add(sequence)
        return tuple(deltas)

    def forget_lookups(self) -> None:
        """Reset the prefix cache statistics in `load`: the warm-up's lookups do not count."""
        self._prefix_tokens = self._prefix_hits = 0

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it, without a delta. Unknown ones are ignored."""
        for sequence in list(self._choices.live.get(request_id, ())):
            if choice is None or sequence.choice == choice:
                self._remove(sequence)

    def schedule(self, now: float) -> StepPlan | None:
        """The next plan, or None if enough plans are in flight or nothing can be computed now.

        Raises:
            EngineError: INTERNAL, a bug: sequences are live, but nothing is in flight or can be computed.
        """
        is_async = len(self._in_flight) >= self._depth
        if is_async and not self._can_schedule_async():
            return None
        self._preempt_for_waiting()
        work = classify_running(self._running, is_async=is_async)
        demand = measure_demand(
            work,
            islice(self._waiting, max(1, len(self._free_slots))),
            self._choices.num_live - len(self._running),
            self._depth * self._limits.max_batch_tokens,
            is_async=is_async,
        )
        budget = next_budget(self._limits, self._depth, demand)
        draft = PlanDraft(self._epoch, self._step + 1, is_async)
        # 1. Decodes. 2. Prompts, running and waiting ones merged in priority order. 3. More decodes, with the
        # tokens that the prompts could not use. `tokens` is what is left of the budget.
        tokens = self._schedule_running(draft, work.ready_decodes, budget.tokens - budget.prompt_tokens)
        tokens += budget.prompt_tokens
        for sequence in work.ready_prompts:
            tokens = self._schedule_waiting(draft, tokens, now, before=sequence)
            tokens = self._schedule_running(draft, (sequence,), tokens)
        tokens = self._schedule_waiting(draft, tokens, now)
        self._schedule_running(draft, work.ready_decodes, tokens)
        self._tables.release_copy_sources()
        if not draft.chunks:
            if self._choices.live and not self._in_flight:
                raise EngineError("INTERNAL", "no sequence can be scheduled, although some are live")
            return None
        plan = draft.build(self._freed_slots, async_scheduling=self._limits.async_scheduling)
        self._step = plan.step
        self._freed_slots.clear()
        self._in_flight.append((plan, draft.sequences))
        return plan

    def apply(self, sampled: Sampled, now: float) -> tuple[Delta, ...]:
        """Apply the results of the oldest plan in flight; returns the new tokens.

        Raises:
            EngineError: INTERNAL, if the results belong to another step.
        """
        plan, sequences = self._in_flight.popleft()
        if sampled.step != plan.step:
            raise EngineError("INTERNAL", f"results of step {sampled.step}, expected {plan.step}")
        tokens = iter(zip(sampled.token_ids, sampled.logprobs, strict=True))
        deltas = []
        for prompt in sampled.prompt_logprobs:
            sequences[prompt.chunk].prompt_logprobs += prompt.positions
        for chunk, sequence in zip(plan.chunks, sequences, strict=True):
            token = next(tokens) if chunk.sample else None
            num_tokens = len(chunk.token_ids)
            sequence.num_tokens_in_flight -= num_tokens
            sequence.num_pending_tokens -= chunk.sample
            if sequence.slot is None:  # the sequence was cancelled or has ended since this plan was made
                continue
            self._tables.advance(sequence, num_tokens)
            if self._choices.held_back and chunk.start < sequence.prompt_len <= sequence.num_computed_tokens:
                self._requeue_siblings(sequence.request.id)
            if token is not None:
                delta = sequence.append(*token, now, self._limits.eos_token_ids)
                if delta.finish:
                    self._remove(sequence)
                deltas.append(delta)
        return tuple(deltas)

    def check_integrity(self) -> None:
        """Check that the scheduler's state is consistent.

        Raises:
            AssertionError: it is not.
        """
        check_sequences(self._choices, self._running, self._waiting)
        check_slots(self._running, self._free_slots, self._limits)
        check_plans_in_flight(self._choices, self._in_flight, self._limits)
        self._tables.check_integrity(list(self._running))

    # The parts of a plan

    def _can_schedule_async(self) -> bool:
        """Whether another plan can be made before the results of the plan in flight are known.

        It cannot in these cases: the host must know the tokens of the plan in flight; choices are held back
        until its results come; a sequence may have to be preempted, but is in flight.
        """
        if not self._limits.async_scheduling or len(self._in_flight) > self._depth or self._choices.held_back:
            return False
        plan, _ = self._in_flight[-1]
        if not plan.sample_on_device:
            return False
        if self._waiting and self._running and outranks(self._waiting.first, self._running.last):
            return False
        max_tokens = self._limits.max_batch_tokens
        missing = (
            self._tables.num_missing_blocks_until(
                sequence, sequence.num_planned_tokens + min(sequence.num_unplanned_tokens, max_tokens)
            )
            for sequence in self._running
        )
        return sum(max(0, blocks) for blocks in missing) <= self._tables.num_available_blocks

    def _schedule_running(self, draft: PlanDraft, sequences: Iterable[Sequence], tokens: int) -> int:
        """Plan the next chunk of each of these running sequences; returns how many tokens are left.

        A decode is a chunk of one token. A prompt longer than `tokens` is cut here; later plans continue it.
        """
        for sequence in sequences:
            if tokens == 0:
                break
            if sequence.last_planned_step == draft.step or sequence.slot is None:
                continue  # it is already in this plan, or was preempted for a sequence in this plan
            chunk = min(sequence.num_unplanned_tokens, tokens)
            end = sequence.num_planned_tokens + chunk
            if self._make_room(sequence, end):
                draft.add_chunk(sequence, chunk, self._tables.allocate_until(sequence, end))
                tokens -= chunk
        return tokens

    def _schedule_waiting(
        self, draft: PlanDraft, tokens: int, now: float, before: Sequence | None = None
    ) -> int:
        """Start waiting sequences in priority order, until one has no room; returns how many tokens are left.

        No later sequence overtakes one without room, which could starve otherwise. With `before`, only
        sequences that come before that one in priority order start.
        """
        while tokens > 0 and self._waiting:
            sequence = self._waiting.first
            if before is not None and sequence.order > before.order:
                break
            if draft.is_async and not sequence.can_sample_on_device:
                break
            sibling = self._choices.sibling_with_prompt(sequence)
            if sibling is None and self._choices.sibling_computes_prompt(sequence):
                self._waiting.remove(sequence)
                self._choices.hold_back(sequence)
                continue
            if not self._free_slots:
                break
            match = self._tables.match_prefix(sequence, sibling)
            num_free_slots = len(self._free_slots)
            if not has_room_to_start(sequence, match, self._running, self._tables, num_free_slots):
                break
            self._start(draft, sequence, match, now, is_fork=sibling is not None)
            tokens = self._schedule_running(draft, (sequence,), tokens)
        return tokens

    def _start(
        self, draft: PlanDraft, sequence: Sequence, match: PrefixMatch, now: float, *, is_fork: bool
    ) -> None:
        """Give a waiting sequence a slot and the blocks of its prefix match. The caller has checked for room.

        With `is_fork` the match comes from a sibling, so it is not counted as a prefix cache lookup.
        """
        self._waiting.remove(sequence)
        self._running.add(sequence)
        sequence.slot = self._free_slots.pop()
        copy = self._tables.start(sequence, match)
        if copy is not None:
            draft.copies.append(copy)
        draft.add_new_sequence(sequence, self._limits.eos_token_ids)
        if sequence.scheduled_at is None:
            sequence.scheduled_at = now
            sequence.num_cached_tokens = min(match.num_cached_tokens, sequence.prompt_len)
            if self._limits.prefix_cache and not is_fork:
                self._prefix_tokens += sequence.prompt_len
                self._prefix_hits += sequence.num_cached_tokens

    # Preemption

    def _make_room(self, sequence: Sequence, end: int) -> bool:
        """Make sure that a running sequence can get the blocks for its tokens up to `end`.

        A sequence that lacks blocks preempts the ones with the lowest priority. If one of those is in flight,
        the sequence waits for a later plan. It does not wait for ever, because results arrive.
        """
        missing = self._tables.num_missing_blocks_until(sequence, end)
        if missing <= 0 or missing <= self._tables.num_available_blocks:
            return True
        victims = victims_to_continue(sequence, missing, self._running, self._tables)
        if victims is None:
            return False
        self._preempt(victims)
        return True

    def _preempt_for_waiting(self) -> None:
        """Preempt running sequences that the first waiting one outranks, before the plan contains them."""
        if not self._waiting or not self._running:
            return
        first = self._waiting.first
        if not can_preempt(first, self._running.last):
            return
        sibling = self._choices.sibling_with_prompt(first)
        if sibling is None and self._choices.sibling_computes_prompt(first):
            return
        match = self._tables.match_prefix(first, sibling)
        victims = victims_to_start(first, match, self._running, self._tables, len(self._free_slots))
        if victims:
            self._preempt(victims)

    def _preempt(self, victims: Iterable[Sequence]) -> None:
        """Take slot and blocks from running sequences and requeue them.

        They keep their tokens. When they start again, they compute the tokens that are no longer cached.
        """
        for sequence in victims:
            self._stop(sequence)
            sequence.prompt_logprobs.clear()  # they will be computed again with the prompt
            self._waiting.add(sequence)

    # The end of a sequence

    def _stop(self, sequence: Sequence) -> None:
        """Free the slot and the blocks of a running sequence."""
        slot = slot_of(sequence)
        self._running.remove(sequence)
        self._freed_slots.append(slot)
        self._free_slots.append(slot)
        self._tables.free(sequence)
        sequence.slot = None
        self._requeue_siblings(sequence.request.id)

    def _requeue_siblings(self, request_id: str) -> None:
        """Queue the choices that are held back: their prompt is computed, or no choice computes it now."""
        for sequence in self._choices.release(request_id):
            self._waiting.add(sequence)

    def _remove(self, sequence: Sequence) -> None:
        """Remove a sequence that runs, waits or is held back."""
        if sequence.slot is not None:
            self._stop(sequence)
        elif not self._choices.is_held_back(sequence):
            self._waiting.remove(sequence)
        self._choices.remove(sequence)
