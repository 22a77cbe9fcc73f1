"""The leader's loop body: schedule a plan, send it to every rank, run it, take in what was drawn."""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable

from engine.distributed.channel import HasFileno, PlanHub
from engine.execution.runner import Runner
from engine.grammar.service import GrammarService
from engine.request import Delta, Load, Request, SamplingParams
from engine.sampling.sampler import Drawn
from engine.scheduling.scheduler import Scheduler


class EngineCore:
    """Owns: the scheduler, the grammars, this rank's runner and the other ranks' attention.

    Does not own: the clock, the sockets to whoever submits requests.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        hub: PlanHub | None,
        sampler: int,
        grammars: GrammarService,
    ) -> None:
        self.grammars = grammars
        self._scheduler = scheduler
        self._runner = runner
        self._hub = hub
        self._sampler = sampler  # the rank that draws tokens
        self._drawn_here: deque[Drawn] = deque()

    @property
    def busy(self) -> bool:
        """Whether a sequence lives or a step is in flight."""
        return self._scheduler.has_work

    @property
    def load(self) -> Load:
        """How busy the replica is."""
        return self._scheduler.load

    def submit(self, request: Request, now: float) -> tuple[Delta, ...]:
        """Queue a request; see Scheduler.submit. Waits for a grammar that is not ready."""
        return self._scheduler.submit(request, now, self.grammars.follow(request))

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """Forget a request; see Scheduler.cancel."""
        self._scheduler.cancel(request_id, choice)

    def launch(self, now: float, began: Callable[[int], None] = lambda tokens: None) -> int:
        """Start as many steps as may be in flight; returns how many are. `began` hears the tokens of each."""
        while plan := self._scheduler.schedule(now):
            began(plan.tokens)
            if self._hub is not None:
                self._hub.broadcast(plan)
            drawn = self._runner.run(plan)
            if drawn is not None:
                self._drawn_here.append(drawn)
        return self._scheduler.plans_in_flight

    def collect(self, now: float) -> tuple[int, tuple[Delta, ...]]:
        """Wait for the oldest step in flight: its number and its new tokens."""
        if self._drawn_here:
            sampled = self._drawn_here.popleft()()
        else:
            assert self._hub is not None
            sampled = self._hub.receive(self._sampler)
        return sampled.step, self._scheduler.apply(sampled, now)

    def settle(self, now: float) -> None:
        """Take in what is in flight where no request lives any more."""
        load = self.load
        while self._scheduler.plans_in_flight and not load.running and not load.waiting:
            self.collect(now)

    def canary(self, now: float) -> None:
        """Run a small request to its end: every communicator works and every rank answers. Not while busy."""
        assert not self.busy, "its tokens would be mixed with those of others"
        self.submit(Request("canary", (0,), SamplingParams(0.0), max_tokens=1, ignore_eos=True), now)
        self._finish(now)

    def rehearse(self, now: float, most: int, longest: int, step: int) -> None:
        """Run what a device may compile for, so that no request waits for its compiler. Not while busy.

        Prompts of up to `longest` tokens, batches of up to `most` sequences, and a step of `step` tokens.
        """
        assert not self.busy, "its tokens would be mixed with those of others"
        lengths = sorted({1 << power for power in range(longest.bit_length())} | {longest})
        sizes = sorted({1 << power for power in range(most.bit_length())} | {most})
        batches = [*((1, length) for length in lengths), *((size, 1) for size in sizes)]
        batches.append((min(most, -(-step // longest)), longest))
        for batch, (size, length) in enumerate(batches):
            for number in range(size):
                # Long prompts begin differently, or they would be found in the prefix cache.
                prompt = (batch + number if length > 1 else 0, *[0] * (length - 1))
                name, sampling = f"rehearsal {batch} {number}", SamplingParams(1.0, seed=0)
                self.submit(Request(name, prompt, sampling, max_tokens=2, ignore_eos=True), now)
            self._finish(now)
        self._scheduler.forget_lookups()

    def wait(self, beside: HasFileno) -> None:
        """Sleep until `beside` can be read. Raises EngineError when another rank goes meanwhile."""
        if self._hub is not None:
            self._hub.wait(beside)
        else:
            select.select([beside], [], [])

    def close(self) -> None:
        """Let the other ranks go."""
        self.grammars.close()
        if self._hub is not None:
            self._hub.close()

    def _finish(self, now: float) -> None:
        while self.busy:
            self.launch(now)
            self.collect(now)
