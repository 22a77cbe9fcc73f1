from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.budget import next_budget, prompt_budget
from engine.scheduling.demand import Demand
from engine.scheduling.limits import Limits


def limits(**overrides: Any) -> Limits:
    return Limits(100, 64, kv_blocks=64, **{"max_batch_tokens": 512, "weight_tokens": 16, **overrides})


def test_a_lone_prompt_at_most_doubles_the_cost_of_a_step() -> None:
    for decodes in (1, 16, 200):
        cost = 16 + decodes
        assert prompt_budget(limits(), 1, decodes, num_prompts=1) == cost


def test_a_prompt_without_decodes_takes_the_whole_step() -> None:
    assert next_budget(limits(), 1, Demand(0, 1, 4000, 4000)).tokens == 512


def test_the_more_wait_the_more_of_a_step_goes_to_prompts() -> None:
    assert prompt_budget(limits(), 1, num_decodes=16, num_prompts=32) == 64
    assert prompt_budget(limits(), 1, num_decodes=16, num_prompts=500) == 512


def test_answers_that_stopped_in_the_middle_get_whole_steps() -> None:
    def share(resumed: int, **options: int) -> tuple[int, int]:
        found = next_budget(limits(**options), 1, Demand(8, 8, 4000, 4000, num_resumed=resumed))
        return found.tokens, found.prompt_tokens

    assert share(0) == (8 + 24, 24)
    assert share(1) == (512, 512 - 8)
    assert share(1, max_prefill_tokens=40) == (48, 40)


def test_a_given_number_of_prompt_tokens_is_kept() -> None:
    budget = next_budget(limits(max_prefill_tokens=40), 1, Demand(16, 500, 4000, 4000))
    assert (budget.tokens, budget.prompt_tokens) == (56, 40)


def test_plans_of_a_round_get_equally_many_tokens_with_a_prompt_beside_many_decodes() -> None:
    # 48 prompt tokens fit a round with 16 decodes: one plan takes 32 of them, the other 16 and the decodes.
    first = next_budget(limits(), 2, Demand(16, 1, 4000, 4000))
    second = next_budget(limits(), 2, Demand(16, 2, 4000, 4000 - 32, num_tokens_in_flight=32))
    assert (first.tokens, first.prompt_tokens) == (32, 32)
    assert (second.tokens, second.prompt_tokens) == (32, 16)


def test_decodes_are_divided_among_the_plans() -> None:
    budget = next_budget(limits(), 4, Demand(10, 0, 0, 0))
    assert (budget.tokens, budget.prompt_tokens) == (3, 0)


@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 100),
    st.integers(0, 100),
    st.integers(0, 100),
)
def test_a_budget_fits_a_plan_and_is_never_empty_while_there_is_work(
    depth: int, max_batch_tokens: int, decodes: int, prompts: int, tokens: int, ready: int, in_flight: int
) -> None:
    demand = Demand(decodes, prompts, tokens + ready, ready, in_flight, num_resumed=prompts // 2)
    budget = next_budget(limits(max_batch_tokens=max_batch_tokens), depth, demand)
    assert 0 <= budget.prompt_tokens <= budget.tokens <= max_batch_tokens
    assert budget.tokens > 0 or not (decodes or tokens + ready)
