"""How the scheduler follows grammars, and passes on the log-probabilities of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.errors import RequestError
from engine.plan import PromptLogprobs, Sampled
from engine.request import (
    Delta,
    FinishReason,
    Grammar,
    PositionLogprobs,
    Request,
    SamplingParams,
    TokenLogprob,
)
from engine.scheduling.limits import Limits
from engine.scheduling.scheduler import Scheduler

LIMITS = Limits(
    vocab_size=50, max_model_len=64, eos_token_ids=(0,), kv_blocks=16, block_size=4, max_batch_tokens=8
)
UNDER = SamplingParams(grammar=Grammar("regex", "a+"))


class Countdown:
    """Ends the output after `length` tokens; its mask is the number of tokens so far."""

    def __init__(self, length: int, output: Sequence[int], end: FinishReason = "stop") -> None:
        self._length, self._seen, self._end = length, len(output), end

    @property
    def finish(self) -> FinishReason | None:
        return self._end if self._seen >= self._length else None

    def accept(self, token_id: int) -> None:
        self._seen += 1

    def mask(self) -> bytes:
        return bytes([self._seen])


def step(scheduler: Scheduler, token: int = 7) -> tuple[list[bytes], tuple[Delta, ...]]:
    """Run one step that samples `token` for every sequence; returns its masks and deltas."""
    plan = scheduler.schedule(0.0)
    assert plan is not None
    samples = sum(chunk.sample for chunk in plan.chunks)
    deltas = scheduler.apply(Sampled(plan.step, (token,) * samples, (None,) * samples), 0.0)
    scheduler.check_integrity()
    return [mask.bits for mask in plan.masks], deltas


def test_every_row_that_samples_under_a_grammar_has_its_mask() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.submit(Request("free", (1, 2), max_tokens=9), 0.0)
    scheduler.submit(Request("r", (1,) * 6, UNDER, max_tokens=9), 0.0, lambda output: Countdown(3, output))
    masks: list[bytes] = []
    while scheduler.has_work:
        masks += step(scheduler)[0]
    assert masks == [b"\0", b"\1", b"\2"]


@pytest.mark.parametrize("end", ["stop", "length"])
def test_the_grammars_end_is_the_outputs(end: FinishReason) -> None:
    scheduler = Scheduler(LIMITS)
    request = Request("r", (1,), UNDER, max_tokens=9, ignore_eos=True)
    scheduler.submit(request, 0.0, lambda output: Countdown(2, output, end))
    assert [delta.finish for _ in range(2) for delta in step(scheduler, token=0)[1]] == [None, end]
    assert not scheduler.has_work


def test_a_replay_goes_on_after_its_prior_output_or_is_over() -> None:
    scheduler = Scheduler(LIMITS)
    request = Request("r", (1,), UNDER, max_tokens=9, n=2, prior=((7,), (7, 7)))
    (over,) = scheduler.submit(request, 0.0, lambda output: Countdown(2, output))
    assert (over.choice, over.index, over.token_ids, over.finish) == (1, 2, (), "stop")
    masks, (delta,) = step(scheduler)
    assert (masks, delta.index, delta.finish) == ([b"\1"], 1, "stop")


def test_prior_output_that_cannot_be_followed_leaves_nothing_behind() -> None:
    def follow(output: Sequence[int]) -> Countdown:
        if output:
            raise RequestError("INVALID_GRAMMAR", "no")
        return Countdown(2, output)

    scheduler = Scheduler(LIMITS)
    with pytest.raises(RequestError):
        scheduler.submit(Request("r", (1,), UNDER, n=2, prior=((), (7,))), 0.0, follow)
    assert not scheduler.has_work
    scheduler.check_integrity()


def test_log_probabilities_of_the_prompt_come_with_the_first_token_of_the_first_choice() -> None:
    scheduler, prompt = Scheduler(LIMITS), tuple(range(1, 21))
    scheduler.submit(Request("r", prompt, n=2, max_tokens=2, prompt_logprobs=0), 0.0)
    deltas: list[Delta] = []
    scoring: set[int] = set()
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        assert plan is not None
        scoring -= set(plan.freed_slots)
        scoring |= {new.slot for new in plan.new_sequences if new.prompt_logprobs is not None}
        scored = []
        for index, chunk in enumerate(plan.chunks):
            if chunk.slot in scoring:
                tokens = prompt[chunk.start + 1 : chunk.start + 1 + len(chunk.token_ids)]
                entries = tuple(PositionLogprobs(TokenLogprob(token, -1.0)) for token in tokens)
                scored.append(PromptLogprobs(index, entries))
        samples = sum(chunk.sample for chunk in plan.chunks)
        deltas += scheduler.apply(Sampled(plan.step, (30,) * samples, (None,) * samples, tuple(scored)), 0.0)
    (first,) = (delta for delta in deltas if delta.prompt_logprobs)
    assert (first.choice, first.index) == (0, 0)
    assert [entry.chosen.token_id for entry in first.prompt_logprobs] == list(prompt[1:])
