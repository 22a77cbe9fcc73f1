"""Random traffic on schedulers that are too small for it, against a model that notices every mistake.

`PHALANX_STORM_STEPS` sets how many steps are run in all.
"""

from __future__ import annotations

import os
import random
from collections import deque
from typing import Any

import pytest

from engine.plan import StepPlan
from engine.request import Delta, Request
from engine.scheduling.limits import Limits
from engine.scheduling.scheduler import Scheduler
from tests.unit.engine.fake_model import EOS, VOCABULARY, FakeRank, expected, kept_of_all

STEPS = int(os.environ.get("PHALANX_STORM_STEPS", "100000"))
WORLDS = 50
BLOCK_SIZE = 4
LONGEST = 28


class Storm:
    """One scheduler, its rank and everybody who asks something of it.

    Half of the prompts begin like others and half of the requests want several choices; some come with prior
    output, some are cancelled, in flight or not.
    """

    def __init__(self, seed: int) -> None:
        draw = self.draw = random.Random(seed)
        self.depth = draw.randint(1, 3)
        window = draw.choice((None, None, 1, 3, 8, 13))
        budget = draw.randint(1, 20)
        shape: dict[str, Any] = {
            "max_batch_tokens": budget,
            "max_running": draw.randint(1, 6),
            "window": window,
            "prefix_cache": draw.random() < 0.75,
            "max_prefill_tokens": draw.choice((0, 0, 3)),
            "weight_tokens": draw.choice((1, 16)),
            "async_scheduling": self.depth == 1 and draw.random() < 0.7,
        }
        least = Limits(VOCABULARY, LONGEST, kv_blocks=99, block_size=BLOCK_SIZE, **shape).blocks_per_sequence
        blocks = least + draw.choice((0, 1, 3, 8))
        self.limits = Limits(VOCABULARY, LONGEST, (EOS,), blocks, BLOCK_SIZE, **shape)
        self.scheduler = Scheduler(self.limits, depth=self.depth)
        self.rank = FakeRank(BLOCK_SIZE, window)
        self.flying: deque[StepPlan] = deque()
        self.letters = draw.choice((2, VOCABULARY - 1))
        self.beginnings = [[draw.randint(1, self.letters) for _ in range(16)] for _ in range(2)]
        self.requests: dict[str, Request] = {}  # with a choice that lives
        self.streams: dict[tuple[str, int], list[int]] = {}
        self.kept: dict[tuple[str, int], list[float]] = {}
        self.born: dict[tuple[str, int], tuple[int, int]] = {}  # step of arrival, tokens ahead and its own
        self.arrivals = self.steps = self.patience = 0
        self.flat = draw.random() < 0.5  # all of one priority

    def run(self, steps: int) -> None:
        """Live through that many steps, then let everyone finish."""
        draw = self.draw
        calm, crowd = draw.uniform(0.05, 0.5), draw.randint(1, 12)
        while self.steps < steps:
            if len(self.requests) < crowd and draw.random() < calm:
                self.submit()
            if self.streams and draw.random() < 0.02:
                self.cancel()
            self.step()
        # Every step computes a token that is needed, or computes again one that somebody ahead took the
        # blocks of; that at most half of all steps are of the second kind is not a law, but holds.
        bound = self.steps + 2 * self.work()
        while self.scheduler.has_work:
            self.step()
            assert self.steps <= bound, "a sequence starves"
        assert not self.streams
        load = self.scheduler.load
        assert (load.running, load.waiting, load.kv_blocks_free) == (0, 0, self.limits.kv_blocks), "a leak"

    def work(self) -> int:
        """Tokens that those who live may still have, computed or not."""
        return sum(self.total(name) for name, _ in self.streams) + self.depth + self.limits.async_scheduling

    def total(self, name: str) -> int:
        request = self.requests[name]
        return len(request.prompt_ids) + request.max_tokens

    def submit(self) -> None:
        draw, name = self.draw, f"r{self.arrivals}"
        self.arrivals += 1
        prompt = [draw.randint(1, self.letters) for _ in range(draw.randint(1, 16))]
        if draw.random() < 0.5:
            shared = draw.randint(1, 16)
            prompt = [*draw.choice(self.beginnings)[:shared], *prompt[shared:]]
        max_tokens = draw.randint(1, LONGEST - len(prompt))
        n = draw.choice((1, 1, 2, 4))
        ignore_eos = draw.random() < 0.5
        prior: tuple[tuple[int, ...], ...] = ()
        if draw.random() < 0.2:
            output, _ = expected(prompt, max_tokens, ignore_eos, self.limits.window)
            prior = tuple(tuple(output[: draw.randint(0, len(output) - 1)]) for _ in range(n))
        request = Request(
            name,
            tuple(prompt),
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            n=n,
            prior=prior,
            priority=0 if self.flat else draw.randint(-1, 1),
        )
        self.requests[name] = request
        for choice in range(n):
            self.streams[name, choice] = list(prior[choice]) if prior else []
            self.kept[name, choice] = []
        for choice in range(n):
            self.born[name, choice] = self.steps, self.work()
        assert self.scheduler.submit(request, 0.0) == ()

    def cancel(self) -> None:
        name, choice = self.draw.choice(sorted(self.streams))
        whole = self.draw.random() < 0.5
        self.scheduler.cancel(name, None if whole else choice)
        for key in [key for key in self.streams if key == (name, choice) or (whole and key[0] == name)]:
            self.check(key, ended=None)

    def step(self) -> None:
        """Launch what may be in flight, then take in the oldest of it."""
        while (plan := self.scheduler.schedule(1.0)) is not None:
            assert plan.tokens <= self.limits.max_batch_tokens
            self.flying.append(plan)
            if self.draw.random() < 0.3:
                break
        if self.flying:
            self.steps += 1
            for delta in self.scheduler.apply(self.rank.run(self.flying.popleft()), 2.0):
                self.take(delta)
        else:
            assert not self.scheduler.has_work
            self.steps += 1
        self.scheduler.check_integrity()

    def take(self, delta: Delta) -> None:
        key = (delta.id, delta.choice)
        assert delta.index == len(self.streams[key])
        self.streams[key] += delta.token_ids
        self.kept[key] += [position.chosen.logprob for position in delta.logprobs]
        if delta.finish:
            arrived, ahead = self.born[key]
            if self.flat:
                assert self.steps - arrived <= 2 * ahead, "somebody younger was served before"
            self.check(key, ended=delta.finish)

    def check(self, key: tuple[str, int], ended: str | None) -> None:
        """See that a choice got what an undisturbed run gives, down to what the model had kept of it."""
        request, stream, kept = self.requests[key[0]], self.streams.pop(key), self.kept.pop(key)
        output, finish = expected(
            request.prompt_ids, request.max_tokens, request.ignore_eos, self.limits.window
        )
        assert stream == output[: len(stream)]
        assert ended is None or (stream, ended) == (output, finish)
        all_kept = kept_of_all([*request.prompt_ids, *stream], self.limits.window)
        assert kept == all_kept[len(all_kept) - 1 - len(kept) : -1]
        if not any(name == key[0] for name, _ in self.streams):
            del self.requests[key[0]]


@pytest.mark.parametrize("world", range(WORLDS))
def test_a_storm_harms_nobody(world: int) -> None:
    Storm(world).run(STEPS // WORLDS)
