"""The engine core: rank 0's part of every step.

What happens in a step, in this order (files are under `engine/`):

 1. schedule     The scheduler decides a `StepPlan`: which sequences compute which tokens, with which KV
                 blocks, and which of them sample. Grammar masks are in it. scheduling/scheduler.py
 2. broadcast    The plan goes to every other rank (distributed/channel.py). All ranks then do 3 to 7 with
                 the same plan; the other ranks' loop is in processes/rank.py.
 3. lay out      Each rank updates its block tables and turns the plan into tensors.
                 execution/step_input.py, called by execution/runner.py
 4. forward      A captured CUDA graph is replayed (execution/cuda_graphs.py), or the layers run one by one
                 (execution/decoder.py). A pipeline stage receives hidden states from the stage before and
                 sends its own to the next (distributed/parallel.py). Only the last stage does 5 to 7.
 5. logits       LM head, for the rows that sample and for prompt log-probabilities. execution/decoder.py
 6. processors   Grammar mask, bad words, min_tokens, bias, penalties. sampling/logits_processors.py
 7. sample       Temperature, top-k, top-p, min-p, seeded noise; log-probabilities.
                 sampling/sampler.py, with the arithmetic in kernels/sample.py
 8. collect      The sampling rank, which is the first of the last stage, sends the sampled ids to rank 0
                 (distributed/channel.py). With one stage it is rank 0 itself.
 9. apply        The scheduler appends the ids, ends sequences and frees their blocks. The results are
                 `Delta`s. scheduling/scheduler.py
10. send         Rank 0 sends the deltas and the load as one `Step` to the text process, over a socket that
                 only these two use (ipc/sender.py). It sends `StepEnded` straight to its worker, for the
                 watchdog. processes/serve.py. An offline engine has neither: api.py reads the deltas.
11. text         The text process adds the text of the new tokens (text/service.py) and sends the `Step` to
                 the worker (text/process.py).

`EngineCore.launch` does 1 to 7, `EngineCore.collect` does 8 and 9. Between two steps, processes/serve.py
handles commands: new requests, cancellations, probes. Several steps may be in flight: as many as there are
pipeline stages, or two with async scheduling. Then a step is scheduled (1) before an earlier one is
collected (8).
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable

from engine.distributed.channel import HasFileno, PlanHub
from engine.execution.runner import Runner
from engine.grammar.service import GrammarService
from engine.plan import Sampled
from engine.processes.warm_up import warm_up_requests
from engine.request import Delta, Load, Request, SamplingParams
from engine.sampling.sampler import PendingSample
from engine.scheduling.scheduler import Scheduler


class EngineCore:
    """Rank 0's part of every step.

    Owns: the scheduler, the grammars, this rank's runner, the connections to the other ranks. Does not own:
    the clock, the socket to the worker.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        hub: PlanHub | None,
        sampling_rank: int,
        grammars: GrammarService,
    ) -> None:
        self.grammars = grammars
        self._scheduler = scheduler
        self._runner = runner
        self._hub = hub  # None without other ranks
        self._sampling_rank = sampling_rank
        self._pending_samples: deque[PendingSample] = deque()  # stays empty if another rank samples

    @property
    def busy(self) -> bool:
        """Whether a sequence waits or runs, or a step is in flight."""
        return self._scheduler.has_work

    @property
    def load(self) -> Load:
        """How busy the replica is."""
        return self._scheduler.load

    def submit(self, request: Request, now: float) -> tuple[Delta, ...]:
        """Queue a request; see Scheduler.submit. Blocks while the request's grammar is compiled."""
        return self._scheduler.submit(request, now, self.grammars.follow(request))

    def cancel(self, request_id: str, choice: int | None = None) -> None:
        """End a request without further tokens; see Scheduler.cancel."""
        self._scheduler.cancel(request_id, choice)

    def launch(self, now: float, on_launch: Callable[[int], None] = lambda tokens: None) -> int:
        """Start as many steps as may be in flight; returns how many are.

        `on_launch` is called before each step with its number of tokens.
        """
        while plan := self._scheduler.schedule(now):
            on_launch(plan.tokens)
            if self._hub is not None:
                self._hub.broadcast(plan)
            pending = self._runner.run(plan)
            if pending is not None:
                self._pending_samples.append(pending)
        return self._scheduler.plans_in_flight

    def collect(self, now: float) -> tuple[int, tuple[Delta, ...]]:
        """Wait for the oldest step in flight; returns its number and its new tokens."""
        sampled = self._next_sampled()
        return sampled.step, self._scheduler.apply(sampled, now)

    def _next_sampled(self) -> Sampled:
        if self._pending_samples:
            return self._pending_samples.popleft()()
        assert self._hub is not None
        return self._hub.receive(self._sampling_rank)

    def settle(self, now: float) -> None:
        """Collect the steps that are still in flight after the last request has ended or was cancelled."""
        load = self.load
        while self._scheduler.plans_in_flight and not load.running and not load.waiting:
            self.collect(now)

    def wait(self, beside: HasFileno) -> None:
        """Sleep until `beside` is readable.

        Raises:
            EngineError: another rank has ended.
        """
        if self._hub is not None:
            self._hub.wait(beside)
        else:
            select.select([beside], [], [])

    def canary(self, now: float) -> None:
        """Run a request of one token, to show that all ranks and collectives work. Not while busy."""
        assert not self.busy, "the canary would share steps with requests"
        self.submit(Request("canary", (0,), SamplingParams(0.0), max_tokens=1, ignore_eos=True), now)
        self._run_to_end(now)

    def warm_up(self, now: float, max_sequences: int, max_prompt_len: int, max_batch_tokens: int) -> None:
        """Run batches of all sizes, so that no later request waits for the compiler. Not while busy.

        Args:
            now: the time.
            max_sequences: sequences of the largest decode batch.
            max_prompt_len: tokens of the longest prompt.
            max_batch_tokens: tokens of the largest step.
        """
        assert not self.busy, "the warm-up would share steps with requests"
        for batch in warm_up_requests(max_sequences, max_prompt_len, max_batch_tokens):
            for request in batch:
                self.submit(request, now)
            self._run_to_end(now)
        self._scheduler.forget_lookups()

    def close(self) -> None:
        """End the other ranks."""
        self.grammars.close()
        if self._hub is not None:
            self._hub.close()

    def _run_to_end(self, now: float) -> None:
        while self.busy:
            self.launch(now)
            self.collect(now)
