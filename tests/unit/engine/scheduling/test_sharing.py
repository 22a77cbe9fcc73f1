"""KV that several sequences share: prefix cache, choices of one request, windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.plan import PromptLogprobs, StepPlan
from engine.request import Delta, PositionLogprobs, Request, TokenLogprob
from engine.scheduling.block_tables import BlockTables
from engine.scheduling.blocks import blocks_for
from engine.scheduling.limits import Limits
from engine.scheduling.prefix_match import NO_MATCH
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from tests.unit.engine.fake_model import VOCABULARY, FakeRank, expected

PROMPT = tuple(range(1, 11))  # two full blocks and a half


def limits(**overrides: Any) -> Limits:
    shape = {"kv_blocks": 16, "block_size": 4, "max_model_len": 48, "max_batch_tokens": 32, "max_running": 8}
    return Limits(VOCABULARY, **{**shape, **overrides})


class Engine:
    """A scheduler with its rank, both new."""

    def __init__(self, depth: int = 1, **overrides: Any) -> None:
        self.limits = limits(**overrides)
        self.scheduler = Scheduler(self.limits, depth=depth)
        self.rank = FakeRank(4, self.limits.window)
        self.deltas: list[Delta] = []

    def ask(self, name: str, prompt: tuple[int, ...] = PROMPT, max_tokens: int = 4, **fields: Any) -> None:
        self.scheduler.submit(Request(name, prompt, max_tokens=max_tokens, ignore_eos=True, **fields), 0.0)

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule(1.0)
        assert plan is not None
        self.deltas += self.scheduler.apply(self.rank.run(plan), 2.0)
        self.scheduler.check_integrity()
        return plan

    def run(self) -> int:
        """Run to the end; returns how many tokens were computed."""
        before = self.rank.computed_tokens
        while self.scheduler.has_work:
            self.step()
        return self.rank.computed_tokens - before

    def cached(self, name: str) -> int:
        return sum(delta.cached_tokens for delta in self.deltas if delta.id == name)

    def stream(self, name: str, choice: int = 0) -> list[int]:
        return [t for d in self.deltas if (d.id, d.choice) == (name, choice) for t in d.token_ids]

    def undisturbed(self, prompt: tuple[int, ...] = PROMPT, max_tokens: int = 4) -> list[int]:
        return expected(prompt, max_tokens, True, self.limits.window)[0]


def test_a_prompt_starts_from_what_another_has_left() -> None:
    engine = Engine()
    engine.ask("a")
    assert engine.run() == 13
    engine.ask("b", (*PROMPT[:9], 40, 41))
    assert engine.run() == 13 - 8 + 1
    assert (engine.cached("a"), engine.cached("b")) == (0, 8)
    assert engine.stream("b") == engine.undisturbed((*PROMPT[:9], 40, 41))


def test_output_is_found_by_the_prompt_that_contains_it() -> None:
    engine = Engine()
    engine.ask("a")
    engine.run()
    engine.ask("b", (*PROMPT, *engine.undisturbed(), 7))
    engine.run()
    assert engine.cached("b") == 12


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    engine = Engine()
    for name in ("a", "b"):
        engine.ask(name, PROMPT[:8])
        engine.run()
    assert engine.cached("b") == 4
    assert engine.stream("b") == engine.undisturbed(PROMPT[:8])


def test_the_hit_rate_is_reported() -> None:
    engine = Engine()
    for name in ("a", "b"):
        engine.ask(name)
        engine.run()
    load = engine.scheduler.load
    assert (load.prefix_tokens, load.prefix_hits) == (20, 8)


def test_a_block_is_found_only_once_it_is_computed() -> None:
    engine = Engine(depth=2)
    engine.ask("a")
    first = engine.scheduler.schedule(1.0)
    engine.ask("b")
    second = engine.scheduler.schedule(1.0)
    assert first is not None
    assert second is not None
    assert [chunk.start for chunk in second.chunks] == [0]


def test_nothing_is_found_where_the_cache_is_off() -> None:
    engine = Engine(prefix_cache=False)
    for name in ("a", "b"):
        engine.ask(name)
        assert engine.run() == 13
    assert engine.scheduler.load.prefix_tokens == 0


def test_a_cancelled_request_leaves_what_it_has_computed() -> None:
    engine = Engine(max_batch_tokens=9)
    engine.ask("a")
    engine.step()
    engine.scheduler.cancel("a")
    engine.ask("b")
    engine.run()
    assert engine.cached("b") == 8


def test_a_preempted_sequence_finds_what_nobody_took() -> None:
    engine = Engine(max_running=1)
    engine.ask("a", max_tokens=12, priority=1)
    for _ in range(4):
        engine.step()
    engine.ask("urgent", (40,), 1)
    assert engine.step().freed_slots
    assert engine.step().chunks[0].start == 12
    engine.run()
    assert engine.stream("a") == engine.undisturbed(max_tokens=12)


def test_a_replay_starts_from_what_is_cached_of_its_prior_output() -> None:
    engine = Engine()
    engine.ask("a")
    engine.run()
    engine.ask("b", prior=(tuple(engine.undisturbed()[:3]),))
    assert engine.step().chunks[0].start == 12
    assert engine.stream("b") == engine.undisturbed()[3:]
    assert engine.cached("b") == len(PROMPT)


def test_choices_compute_their_prompt_once() -> None:
    for cache in (True, False):
        engine = Engine(prefix_cache=cache)
        engine.ask("a", n=4)
        prompt, forks = engine.step(), engine.step()
        assert [len(chunk.token_ids) for chunk in prompt.chunks] == [10]
        assert [(chunk.start, len(chunk.token_ids)) for chunk in forks.chunks] == [
            (10, 1),
            (9, 1),
            (9, 1),
            (9, 1),
        ]
        assert len(forks.copies) == 3
        assert engine.limits.kv_blocks - engine.scheduler.load.kv_blocks_free == 2 + 4
        engine.run()
        assert all(engine.stream("a", choice) == engine.undisturbed() for choice in range(4))


def test_choices_copy_the_last_block_of_a_prompt_that_fills_it() -> None:
    engine = Engine()
    engine.ask("a", PROMPT[:8], n=2)
    engine.step()
    forks = engine.step()
    assert len(forks.copies) == 1
    assert [chunk.start for chunk in forks.chunks] == [8, 7]
    engine.run()
    assert engine.stream("a", 1) == engine.undisturbed(PROMPT[:8])


def test_choices_with_prior_output_share_the_prompt_too() -> None:
    engine = Engine(prefix_cache=False)
    whole = engine.undisturbed(max_tokens=8)
    engine.ask("a", max_tokens=8, n=3, prior=((), tuple(whole[:5]), tuple(whole[:1])))
    engine.step()
    assert [chunk.start for chunk in engine.step().chunks][-2:] == [10, 10]
    engine.run()
    assert engine.stream("a", 1) == whole[5:]
    assert engine.stream("a", 2) == whole[1:]


def test_choices_that_wait_for_their_prompt_hold_up_nobody() -> None:
    engine = Engine(max_batch_tokens=12)
    engine.ask("a", n=3)
    engine.ask("b", (40, 41))
    assert [len(chunk.token_ids) for chunk in engine.step().chunks] == [10, 2]


def test_another_choice_computes_the_prompt_when_the_first_is_cancelled() -> None:
    engine = Engine(max_batch_tokens=6, prefix_cache=False)
    engine.ask("a", n=3)
    engine.step()
    engine.scheduler.cancel("a", 0)
    engine.scheduler.check_integrity()
    assert [chunk.start for chunk in engine.step().chunks] == [0]
    engine.run()
    assert engine.stream("a", 1) == engine.stream("a", 2) == engine.undisturbed()


def test_a_choice_that_waits_for_its_prompt_can_be_cancelled() -> None:
    engine = Engine(max_batch_tokens=6)
    engine.ask("a", n=2)
    engine.step()
    engine.scheduler.cancel("a", 1)
    engine.scheduler.check_integrity()
    engine.run()
    assert engine.stream("a", 0) == engine.undisturbed()


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_whole() -> None:
    engine = Engine()
    engine.ask("a")
    engine.run()
    engine.ask("b", prompt_logprobs=0)
    plan = engine.scheduler.schedule(1.0)
    assert plan is not None
    assert plan.chunks[0].start == 0
    sampled = engine.rank.run(plan)
    scores = (PositionLogprobs(TokenLogprob(1, -1.0)),) * 9
    (delta,) = engine.scheduler.apply(replace(sampled, prompt_logprobs=(PromptLogprobs(0, scores),)), 2.0)
    assert delta.prompt_logprobs == scores


def test_blocks_out_of_the_window_are_freed() -> None:
    engine = Engine(window=6, kv_blocks=8, max_model_len=200, max_batch_tokens=16)
    engine.ask("a", PROMPT * 5, 150)
    max_used = 0
    while engine.scheduler.has_work:
        engine.step()
        max_used = max(max_used, engine.limits.kv_blocks - engine.scheduler.load.kv_blocks_free)
    assert engine.stream("a") == engine.undisturbed(PROMPT * 5, 150)
    assert max_used <= blocks_for(6, 4) + 1


def test_a_window_needs_no_blocks_before_it_to_go_on_from_the_cache() -> None:
    engine = Engine(window=6, kv_blocks=8, max_model_len=64, max_batch_tokens=8)
    long = PROMPT * 4
    engine.ask("a", long, 2)
    engine.run()
    engine.ask("b", (*long, 44), 2)
    engine.run()
    assert engine.cached("b") == len(long)
    assert engine.stream("b") == engine.undisturbed((*long, 44), 2)


def test_the_source_of_a_copy_is_no_target_in_the_same_plan() -> None:
    tables = BlockTables(limits(kv_blocks=12))
    first, second = (Sequence(Request("a", PROMPT), choice, (0, choice), 0.0, []) for choice in (0, 1))
    tables.start(first, NO_MATCH)
    tables.allocate_until(first, 10)
    tables.advance(first, 10)
    copy = tables.start(second, tables.match_prefix(second, first))
    assert copy is not None
    tables.free(first)
    third = Sequence(Request("b", PROMPT), 0, (0, 2), 0.0, [])
    assert copy[0] not in tables.allocate_until(third, 32)
    tables.release_copy_sources()
    assert copy[0] in tables.allocate_until(third, 36)


def test_blocks_that_a_waiting_sequence_shares_with_a_victim_do_not_count_as_freed() -> None:
    engine = Engine(kv_blocks=5, max_model_len=20)
    engine.ask("equal", (40,), 6)
    engine.ask("victim", PROMPT[:8], 6, priority=1)
    engine.step()
    engine.step()
    assert engine.scheduler.load.kv_blocks_free == 1
    engine.ask("urgent", (*PROMPT[:8], *range(30, 39)), 2)  # 2 blocks are shared, 3 are missing
    assert not engine.step().freed_slots
