"""Random traffic on schedulers that are too small for it. In the fake model every mistake changes tokens.

`PHALANX_STORM_STEPS` is the number of steps, over all worlds.
"""

from __future__ import annotations

import os
import random
from collections import deque
from typing import Any

import pytest

from engine.plan import StepPlan
from engine.request import Delta, Grammar, Request, SamplingParams
from engine.scheduling.limits import Limits
from engine.scheduling.scheduler import Scheduler
from tests.unit.engine.fake_model import (
    EOS,
    VOCABULARY,
    FakeMatcher,
    FakeRank,
    expected,
    kv_of_all,
    score_prompt,
)

STEPS = int(os.environ.get("PHALANX_STORM_STEPS", "100000"))
WORLDS = 50
BLOCK_SIZE = 4
LONGEST = 28
PLAIN = SamplingParams()
NOT_PLAIN = (
    SamplingParams(grammar=Grammar("json_object")),
    SamplingParams(presence_penalty=1.0),
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(frequency_penalty=1.0, grammar=Grammar("json_object")),
)

Key = tuple[str, int]  # request, choice


class Storm:
    """One scheduler, its rank and all clients.

    Half of the prompts share their beginning, and half of the requests have several choices. Some requests
    have prior output, even all of it. Some are cancelled, in flight or not, or after their end. In most
    worlds some requests have a grammar, penalties or log-probabilities, for which the host must know each
    token.
    """

    def __init__(self, seed: int) -> None:
        draw = self.draw = random.Random(seed)
        self.depth = draw.randint(1, 3)
        window = draw.choice((None, None, 1, 3, 8, 13))
        shape: dict[str, Any] = {
            "max_batch_tokens": draw.randint(1, 20),
            "max_running": draw.randint(1, 6),
            "window": window,
            "prefix_cache": draw.random() < 0.75,
            "max_prefill_tokens": draw.choice((0, 0, 3)),
            "weight_tokens": draw.choice((1, 16)),
            "async_scheduling": self.depth == 1 and draw.random() < 0.7,
        }
        enough = Limits(VOCABULARY, LONGEST, kv_blocks=99, block_size=BLOCK_SIZE, **shape).blocks_per_sequence
        blocks = enough + draw.choice((0, 1, 3, 8))
        self.limits = Limits(VOCABULARY, LONGEST, (EOS,), blocks, BLOCK_SIZE, **shape)
        self.scheduler = Scheduler(self.limits, depth=self.depth)
        self.rank = FakeRank(BLOCK_SIZE, window)
        self.in_flight: deque[StepPlan] = deque()
        self.letters = draw.choice((2, VOCABULARY - 1))
        self.beginnings = [[draw.randint(1, self.letters) for _ in range(16)] for _ in range(2)]
        self.requests: dict[str, Request] = {}  # those with a live choice
        self.streams: dict[Key, list[int]] = {}
        self.kv: dict[Key, list[float]] = {}
        self.born: dict[Key, tuple[int, int]] = {}  # step of arrival, `work` at that time
        self.arrivals = self.steps = 0
        self.has_one_priority = draw.random() < 0.5
        self.not_plain = draw.choice((0.0, 0.2, 0.6))  # the share of requests that are not plain

    def run(self, steps: int) -> None:
        """Run that many steps, then let all requests finish."""
        draw = self.draw
        calm, crowd = draw.uniform(0.05, 0.5), draw.randint(1, 12)
        while self.steps < steps:
            if len(self.requests) < crowd and draw.random() < calm:
                self.submit()
            if self.streams and draw.random() < 0.02:
                self.cancel()
            self.step()
        # A step computes a new token, or again a token whose blocks an older sequence has taken. The bound
        # assumes that at most half of the steps are of the second kind; that is an observation, no proof.
        bound = self.steps + 2 * self.work()
        while self.scheduler.has_work:
            self.step()
            assert self.steps <= bound, "a sequence starves"
        assert not self.streams
        load = self.scheduler.load
        assert (load.running, load.waiting, load.kv_blocks_free) == (0, 0, self.limits.kv_blocks), "a leak"

    def work(self) -> int:
        """The most tokens that all live choices can have, prompts included."""
        tokens = sum(
            len(request.prompt_ids) + request.max_tokens
            for request in (self.requests[name] for name, _ in self.streams)
        )
        return tokens + self.depth + self.limits.async_scheduling

    def submit(self) -> None:
        request = self.make_request(f"r{self.arrivals}")
        self.arrivals += 1
        finished = request.finished or (False,) * request.n
        choices = [choice for choice in range(request.n) if not finished[choice]]
        if choices:
            self.requests[request.id] = request
        for choice in choices:
            self.streams[request.id, choice] = list(request.prior[choice]) if request.prior else []
            self.kv[request.id, choice] = []
        for choice in choices:
            self.born[request.id, choice] = self.steps, self.work()
        follow = FakeMatcher if request.sampling.grammar else None
        for delta in self.scheduler.submit(request, 0.0, follow):
            assert not delta.token_ids
            self.take(delta)

    def make_request(self, name: str) -> Request:
        draw = self.draw
        prompt = [draw.randint(1, self.letters) for _ in range(draw.randint(1, 16))]
        if draw.random() < 0.5:
            shared = draw.randint(1, 16)
            prompt = [*draw.choice(self.beginnings)[:shared], *prompt[shared:]]
        max_tokens = draw.randint(1, LONGEST - len(prompt))
        n = draw.choice((1, 1, 2, 4))
        ignore_eos = draw.random() < 0.5
        sampling, logprobs, prompt_logprobs = PLAIN, None, None
        if draw.random() < self.not_plain:
            sampling = draw.choice((PLAIN, *NOT_PLAIN))
            logprobs, prompt_logprobs = draw.choice((None, 0)), draw.choice((None, 0))
        prior: tuple[tuple[int, ...], ...] = ()
        finished: tuple[bool, ...] = ()
        if draw.random() < 0.2:
            output, _ = expected(prompt, max_tokens, ignore_eos, self.limits.window, sampling)
            prior = tuple(tuple(output[: draw.randint(0, len(output))]) for _ in range(n))
            if draw.random() < 0.2:
                finished = tuple(draw.random() < 0.5 for _ in range(n))
        return Request(
            name,
            tuple(prompt),
            sampling,
            max_tokens,
            ignore_eos=ignore_eos,
            n=n,
            logprobs=logprobs,
            prior=prior,
            finished=finished,
            prompt_logprobs=prompt_logprobs,
            priority=0 if self.has_one_priority else draw.randint(-1, 1),
        )

    def cancel(self) -> None:
        """Cancel a live choice or its whole request; sometimes again, which must be ignored."""
        name, choice = self.draw.choice(sorted(self.streams))
        whole = self.draw.random() < 0.5
        self.scheduler.cancel(name, None if whole else choice)
        for key in [key for key in self.streams if key == (name, choice) or (whole and key[0] == name)]:
            self.check(key, ended=None)
        if self.draw.random() < 0.2:
            self.scheduler.cancel(name, choice)

    def step(self) -> None:
        """Launch some of the plans that may be in flight, then apply the results of the oldest."""
        may_launch = not self.in_flight or self.draw.random() < 0.9
        while may_launch and (plan := self.scheduler.schedule(1.0)) is not None:
            assert 0 < plan.tokens <= self.limits.max_batch_tokens
            self.in_flight.append(plan)
            may_launch = self.draw.random() < 0.7
        self.steps += 1
        if self.in_flight:
            for delta in self.scheduler.apply(self.rank.run(self.in_flight.popleft()), 2.0):
                self.take(delta)
        else:
            assert not self.scheduler.has_work
        if self.steps % 3 == 0 or not self.scheduler.has_work:
            self.scheduler.check_integrity()

    def take(self, delta: Delta) -> None:
        """Record a delta. A KeyError means: its choice has ended or was cancelled before."""
        key = (delta.id, delta.choice)
        assert delta.index == len(self.streams[key])
        self.check_prompt_logprobs(delta)
        self.streams[key] += delta.token_ids
        self.kv[key] += [position.chosen.logprob for position in delta.logprobs]
        if delta.finish:
            arrived, work = self.born[key]
            if self.has_one_priority:
                assert self.steps - arrived <= 2 * work, "a later sequence was served first"
            self.check(key, ended=delta.finish)

    def check_prompt_logprobs(self, delta: Delta) -> None:
        """Check that they come once, with the first token of choice 0, and cover the whole prompt."""
        request = self.requests[delta.id]
        if request.prompt_logprobs is None or delta.choice or delta.index:
            assert not delta.prompt_logprobs
        else:
            kv = kv_of_all(request.prompt_ids, self.limits.window)
            assert delta.prompt_logprobs == score_prompt(request.prompt_ids, kv)

    def check(self, key: Key, ended: str | None) -> None:
        """Check that a choice got the output of an undisturbed run, and the right KV for every token."""
        request, stream, kv = self.requests[key[0]], self.streams.pop(key), self.kv.pop(key)
        window = self.limits.window
        output, finish = expected(
            request.prompt_ids, request.max_tokens, request.ignore_eos, window, request.sampling
        )
        assert stream == output[: len(stream)]
        assert ended is None or (stream, ended) == (output, finish)
        all_kv = kv_of_all([*request.prompt_ids, *stream], window)
        assert kv == all_kv[len(all_kv) - 1 - len(kv) : -1]
        if not any(name == key[0] for name, _ in self.streams):
            del self.requests[key[0]]


@pytest.mark.parametrize("world", range(WORLDS))
def test_a_storm_harms_nobody(world: int) -> None:
    Storm(world).run(STEPS // WORLDS)
