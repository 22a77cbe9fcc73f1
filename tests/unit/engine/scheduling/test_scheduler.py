from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from engine.errors import EngineError, RequestError
from engine.plan import PENDING_TOKEN, Sampled, StepPlan
from engine.request import Delta, Request, SamplingParams
from engine.scheduling.limits import Limits
from engine.scheduling.priority import AGING_STEPS
from engine.scheduling.scheduler import Scheduler
from tests.unit.engine.fake_model import EOS, VOCABULARY, FakeRank, expected, next_token

GREEDY = SamplingParams(temperature=0)


def limits(**overrides: Any) -> Limits:
    shape = {"kv_blocks": 8, "block_size": 4, "max_model_len": 32, "max_batch_tokens": 16, "max_running": 8}
    return Limits(VOCABULARY, eos_token_ids=(EOS,), **{**shape, "prefix_cache": False, **overrides})


def request(name: str, prompt: int = 4, max_tokens: int = 4, **fields: object) -> Request:
    return Request(
        name,
        tuple(i % (VOCABULARY - 1) + 1 for i in range(prompt)),
        GREEDY,
        max_tokens,
        ignore_eos=True,
        **fields,
    )  # type: ignore[arg-type]


def run(scheduler: Scheduler, rank: FakeRank, steps: int = 10_000) -> list[Delta]:
    """Run up to `steps` steps, or until nothing is left to compute."""
    deltas: list[Delta] = []
    for _ in range(steps):
        plan = scheduler.schedule(1.0)
        if plan is None:
            break
        deltas.extend(scheduler.apply(rank.run(plan), 2.0))
    return deltas


def busy(scheduler: Scheduler) -> tuple[int, int, int]:
    """Sequences running and waiting, blocks available."""
    load = scheduler.load
    return load.running, load.waiting, load.kv_blocks_free


def stream(deltas: list[Delta], name: str, choice: int = 0) -> list[int]:
    return [token for d in deltas if (d.id, d.choice) == (name, choice) for token in d.token_ids]


def test_sequences_are_preempted_when_blocks_run_out_and_lose_no_token() -> None:
    scheduler, rank = Scheduler(limits()), FakeRank(4)
    for name in ("a", "b", "c"):
        scheduler.submit(request(name, prompt=4, max_tokens=20), 0.0)
    preempted = False
    deltas: list[Delta] = []
    while scheduler.has_work:
        running = scheduler.load.running
        deltas.extend(run(scheduler, rank, steps=1))
        preempted |= scheduler.load.running < running and scheduler.load.waiting > 0
    assert preempted
    for name in ("a", "b", "c"):
        assert stream(deltas, name) == expected(range(1, 5), 20, True)[0]


def test_a_long_prompt_is_chunked_beside_decodes_that_go_on() -> None:
    scheduler, rank = Scheduler(limits(kv_blocks=32, max_model_len=100)), FakeRank(4)
    scheduler.submit(request("short", max_tokens=20), 0.0)
    run(scheduler, rank, steps=1)
    scheduler.submit(request("long", prompt=60), 0.0)
    for _ in range(4):
        plan = scheduler.schedule(1.0)
        assert plan is not None
        assert [len(chunk.token_ids) for chunk in plan.chunks] == [1, 15]
        scheduler.apply(rank.run(plan), 2.0)


def test_nobody_overtakes_a_request_that_waits_for_blocks() -> None:
    scheduler, rank = Scheduler(limits()), FakeRank(4)
    scheduler.submit(request("first", prompt=20, max_tokens=8), 0.0)
    run(scheduler, rank, steps=2)
    scheduler.submit(request("big", prompt=16), 0.0)
    scheduler.submit(request("small", prompt=1), 0.0)
    plan = scheduler.schedule(1.0)
    assert plan is not None
    assert not plan.new_sequences
    assert scheduler.load.waiting == 2


def test_blocks_that_a_running_prompt_still_lacks_are_not_given_to_newcomers() -> None:
    scheduler, rank = Scheduler(limits(), depth=2), FakeRank(4)
    scheduler.submit(request("older", prompt=28), 0.0)
    first = scheduler.schedule(1.0)
    scheduler.submit(request("younger", prompt=11), 0.0)
    assert scheduler.schedule(1.0) is None
    assert busy(scheduler) == (1, 1, 4)
    assert first is not None
    scheduler.apply(rank.run(first), 2.0)
    scheduler.submit(request("later", prompt=1), 0.0)
    second = scheduler.schedule(1.0)
    assert second is not None
    assert [len(chunk.token_ids) for chunk in second.chunks] == [12]


def test_the_lower_priority_is_preempted_when_neither_has_blocks_to_go_on() -> None:
    scheduler, rank = Scheduler(limits(), depth=2), FakeRank(4)
    for name in ("older", "younger"):
        scheduler.submit(request(name, prompt=12, max_tokens=20), 0.0)
    deltas = run(scheduler, rank)
    assert [delta.id for delta in deltas if delta.finish] == ["older", "younger"]
    assert stream(deltas, "younger") == expected(range(1, 13), 20, True)[0]


def test_a_sequence_in_flight_is_not_preempted() -> None:
    scheduler, rank = Scheduler(limits(max_batch_tokens=32), depth=2), FakeRank(4)
    for name in "abcd":
        scheduler.submit(request(name, prompt=5, max_tokens=20), 0.0)
    run(scheduler, rank, steps=1)
    in_flight = deque([scheduler.schedule(1.0), scheduler.schedule(1.0)])
    plan = in_flight.popleft()
    while plan is not None:
        scheduler.apply(rank.run(plan), 2.0)
        in_flight.append(scheduler.schedule(1.0))
        plan = in_flight.popleft() if in_flight[-1] else None
    (cd, _) = in_flight  # a and b lack a third block
    assert busy(scheduler) == (4, 0, 0)
    scheduler.check_integrity()
    assert cd is not None
    scheduler.apply(rank.run(cd), 2.0)
    assert scheduler.schedule(1.0) is not None  # a and b have taken the blocks of d
    assert busy(scheduler) == (3, 1, 0)
    scheduler.check_integrity()


def test_nobody_is_preempted_in_vain() -> None:
    scheduler, rank = Scheduler(limits(kv_blocks=5, max_model_len=20), depth=2), FakeRank(4)
    for name in ("a", "b"):
        scheduler.submit(request(name, prompt=5, max_tokens=8, priority=1), 0.0)
    a, b = scheduler.schedule(1.0), scheduler.schedule(1.0)
    assert a is not None
    assert b is not None
    scheduler.apply(rank.run(a), 2.0)
    a = scheduler.schedule(1.0)
    assert a is not None
    scheduler.apply(rank.run(b), 2.0)
    scheduler.submit(request("urgent", prompt=16), 0.0)  # needs the blocks of both, and a is in flight
    assert scheduler.schedule(1.0) is not None
    assert busy(scheduler) == (2, 1, 1)
    scheduler.check_integrity()


def test_a_request_of_lower_number_runs_first() -> None:
    scheduler, rank = Scheduler(limits(max_running=1)), FakeRank(4)
    for name, priority in (("later", 1), ("first", -1), ("second", 0), ("third", 0)):
        scheduler.submit(request(name, priority=priority), 0.0)
    finished = [delta.id for delta in run(scheduler, rank) if delta.finish]
    assert finished == ["first", "second", "third", "later"]


def test_a_lower_priority_is_preempted_and_loses_no_token() -> None:
    scheduler, rank = Scheduler(limits(max_running=2)), FakeRank(4)
    for name in ("a", "b"):
        scheduler.submit(request(name, max_tokens=12, priority=1), 0.0)
    deltas = run(scheduler, rank, steps=3)
    scheduler.submit(request("urgent", max_tokens=2), 0.0)
    deltas += run(scheduler, rank)
    assert [delta.id for delta in deltas if delta.finish] == ["urgent", "a", "b"]
    for name in ("a", "b"):
        assert stream(deltas, name) == expected(range(1, 5), 12, True)[0]


def test_an_urgent_request_overtakes_a_long_prompt_that_is_being_computed() -> None:
    scheduler, rank = Scheduler(limits(kv_blocks=32, max_model_len=100)), FakeRank(4)
    scheduler.submit(request("long", prompt=90, priority=1), 0.0)
    run(scheduler, rank, steps=1)
    scheduler.submit(request("urgent", prompt=12), 0.0)
    plan = scheduler.schedule(1.0)
    assert plan is not None
    assert [len(chunk.token_ids) for chunk in plan.chunks] == [12, 4]


def test_an_equal_priority_is_not_preempted_for_newcomers() -> None:
    scheduler, rank = Scheduler(limits(max_running=1)), FakeRank(4)
    scheduler.submit(request("a", max_tokens=12), 0.0)
    run(scheduler, rank, steps=3)
    scheduler.submit(request("b"), 0.0)
    assert [delta.id for delta in run(scheduler, rank) if delta.finish] == ["a", "b"]


def test_low_priority_gets_its_turn_under_a_stream_of_high() -> None:
    scheduler, rank = Scheduler(limits(max_running=1)), FakeRank(4)
    scheduler.submit(request("patient", max_tokens=2, priority=1), 0.0)
    deltas: list[Delta] = []
    for i in range(AGING_STEPS):
        scheduler.submit(request(f"high{i}", max_tokens=2), 0.0)
        deltas += run(scheduler, rank, steps=2)
        if any(delta.id == "patient" for delta in deltas):
            break
    assert i >= AGING_STEPS // 2 - 1
    assert deltas[-1].id == "patient"


def test_max_tokens_of_0_means_as_many_as_fit() -> None:
    scheduler, rank = Scheduler(limits()), FakeRank(4)
    scheduler.submit(request("a", prompt=4, max_tokens=0), 0.0)
    deltas = run(scheduler, rank)
    assert len(stream(deltas, "a")) == 28
    assert deltas[-1].finish == "length"


def test_plans_in_flight_share_the_sequences_so_that_stages_overlap() -> None:
    scheduler, rank = Scheduler(limits(), depth=2), FakeRank(4)
    for name in "abcd":
        scheduler.submit(request(name, prompt=2), 0.0)
    run(scheduler, rank, steps=1)
    first, second = scheduler.schedule(1.0), scheduler.schedule(1.0)
    assert first is not None
    assert second is not None
    assert (len(first.chunks), len(second.chunks)) == (2, 2)
    assert scheduler.schedule(1.0) is None


def test_a_cancelled_request_frees_its_blocks_at_once_even_in_flight() -> None:
    scheduler, rank = Scheduler(limits()), FakeRank(4)
    scheduler.submit(request("a"), 0.0)
    plan = scheduler.schedule(1.0)
    assert plan is not None
    scheduler.cancel("a")
    assert busy(scheduler) == (0, 0, 8)
    assert scheduler.apply(rank.run(plan), 2.0) == ()
    assert not scheduler.has_work


def test_cancelling_one_choice_leaves_the_others() -> None:
    scheduler, rank = Scheduler(limits()), FakeRank(4)
    scheduler.submit(request("a", n=2), 0.0)
    scheduler.cancel("a", 0)
    deltas = run(scheduler, rank)
    assert stream(deltas, "a", 0) == []
    assert len(stream(deltas, "a", 1)) == 4


def test_output_goes_on_after_prior_output() -> None:
    scheduler, rank = Scheduler(limits()), FakeRank(4)
    whole = expected(range(1, 5), 4, True)[0]
    scheduler.submit(request("a", prior=(tuple(whole[:2]),)), 0.0)
    deltas = run(scheduler, rank)
    assert [(d.index, d.token_ids) for d in deltas] == [(2, (whole[2],)), (3, (whole[3],))]


@pytest.mark.parametrize(
    ("fields", "finish"),
    [
        ({"prior": ((1, 2, 3, 4),)}, "length"),
        ({"prior": ((9,),), "stop_token_ids": (9,)}, "stop"),
    ],
)
def test_a_choice_whose_prior_output_has_ended_finishes_at_once(
    fields: dict[str, object], finish: str
) -> None:
    scheduler = Scheduler(limits())
    (delta,) = scheduler.submit(request("a", **fields), 0.0)
    assert (delta.index, delta.token_ids, delta.finish) == (len(fields["prior"][0]), (), finish)  # type: ignore[index]
    assert not scheduler.has_work


def test_a_choice_marked_finished_is_left_alone() -> None:
    scheduler, rank = Scheduler(limits()), FakeRank(4)
    assert scheduler.submit(request("a", n=2, prior=((1,), ()), finished=(True, False)), 0.0) == ()
    assert {delta.choice for delta in run(scheduler, rank)} == {1}


def test_a_stop_id_ends_a_choice_with_that_token() -> None:
    token = next_token(range(1, 5))
    scheduler, rank = Scheduler(limits()), FakeRank(4)
    scheduler.submit(request("a", stop_token_ids=(token,)), 0.0)
    (delta,) = run(scheduler, rank)
    assert (delta.token_ids, delta.finish) == ((token,), "stop")


def test_timing_has_the_milestones_of_the_choice() -> None:
    scheduler, rank = Scheduler(limits()), FakeRank(4)
    scheduler.submit(request("a"), 0.5)
    timing = run(scheduler, rank)[-1].timing
    assert timing is not None
    assert (timing.queued, timing.scheduled, timing.first_token, timing.finished) == (0.5, 1.0, 2.0, 2.0)


def test_results_of_another_step_than_the_next_are_refused() -> None:
    scheduler = Scheduler(limits())
    scheduler.submit(request("a"), 0.0)
    assert scheduler.schedule(1.0) is not None
    with pytest.raises(EngineError, match="results of step 2, expected 1"):
        scheduler.apply(Sampled(2, (), ()), 1.0)


def test_a_live_id_cannot_be_used_twice() -> None:
    scheduler = Scheduler(limits())
    scheduler.submit(request("a"), 0.0)
    with pytest.raises(RequestError) as caught:
        scheduler.submit(request("a"), 0.0)
    assert caught.value.reason == "DUPLICATE_REQUEST"
    assert scheduler.load.waiting == 1


def test_decodes_are_planned_before_their_tokens_are_known() -> None:
    scheduler, rank = Scheduler(limits(async_scheduling=True)), FakeRank(4)
    scheduler.submit(request("a", prompt=3, max_tokens=3), 0.0)
    plans = [scheduler.schedule(1.0), scheduler.schedule(1.0), scheduler.schedule(1.0)]
    assert plans[2] is None, "one async plan is enough"
    assert [plan.chunks[0].token_ids for plan in plans if plan] == [(1, 2, 3), (PENDING_TOKEN,)]
    deltas: list[Delta] = []
    while plans[0]:
        deltas += scheduler.apply(rank.run(plans.pop(0)), 2.0)  # type: ignore[arg-type]
        plans[-1:] = [scheduler.schedule(1.0), None]
        scheduler.check_integrity()
    assert stream(deltas, "a") == expected((1, 2, 3), 3, True)[0]
    assert rank.step == 3, "no step for a token past the last"


def test_what_follows_the_end_of_a_sequence_is_dropped() -> None:
    scheduler, rank = Scheduler(limits(async_scheduling=True)), FakeRank(4)
    first = next_token((1, 2, 3))
    scheduler.submit(Request("a", (1, 2, 3), GREEDY, 9, (first,)), 0.0)
    plans = [scheduler.schedule(1.0), scheduler.schedule(1.0)]
    (delta,) = scheduler.apply(rank.run(plans[0]), 2.0)  # type: ignore[arg-type]
    assert (delta.token_ids, delta.finish) == ((first,), "stop")
    assert scheduler.has_work, "a step is in flight"
    assert scheduler.apply(rank.run(plans[1]), 2.0) == ()  # type: ignore[arg-type]
    assert not scheduler.has_work
    assert busy(scheduler) == (0, 0, 8)


@pytest.mark.parametrize("fields", [{"logprobs": 0}, {"sampling": SamplingParams(presence_penalty=1.0)}])
def test_a_sequence_that_needs_more_than_token_ids_gets_no_async_plan(fields: dict[str, Any]) -> None:
    scheduler = Scheduler(limits(async_scheduling=True))
    scheduler.submit(Request("a", (1, 2), max_tokens=4, **fields), 0.0)
    assert scheduler.schedule(1.0)
    assert scheduler.schedule(1.0) is None


def test_no_async_plan_is_made_while_a_sequence_has_to_be_preempted() -> None:
    scheduler, rank = Scheduler(limits(kv_blocks=4, max_model_len=16, async_scheduling=True)), FakeRank(4)
    for name in ("older", "younger"):
        scheduler.submit(request(name, prompt=7, max_tokens=8), 0.0)
    deltas: list[Delta] = []
    in_flight = deque[StepPlan]()
    preempted = False
    while scheduler.has_work:
        while plan := scheduler.schedule(1.0):
            in_flight.append(plan)
        deltas += scheduler.apply(rank.run(in_flight.popleft()), 2.0)
        scheduler.check_integrity()
        preempted |= busy(scheduler)[1] == 1
    assert preempted
    for name in ("older", "younger"):
        assert stream(deltas, name) == expected(range(1, 8), 8, True)[0]


def test_a_sequence_that_lacks_blocks_waits_for_no_step_while_younger_ones_decode_asynchronously() -> None:
    scheduler, rank = Scheduler(limits(kv_blocks=4, max_model_len=16, async_scheduling=True)), FakeRank(4)
    scheduler.submit(request("older", prompt=7, max_tokens=8), 0.0)
    scheduler.submit(request("younger", prompt=5, max_tokens=8), 0.0)
    in_flight = deque[StepPlan]()
    for _ in range(8):
        while plan := scheduler.schedule(1.0):
            in_flight.append(plan)
        deltas = scheduler.apply(rank.run(in_flight.popleft()), 2.0)
        assert "older" in {delta.id for delta in deltas}


def test_an_urgent_request_is_not_kept_out_by_async_plans() -> None:
    scheduler, rank = Scheduler(limits(max_running=1, async_scheduling=True)), FakeRank(4)
    scheduler.submit(request("patient", max_tokens=20, priority=1), 0.0)
    plan = scheduler.schedule(1.0)
    scheduler.submit(request("urgent"), 0.0)
    assert scheduler.schedule(1.0) is None
    scheduler.apply(rank.run(plan), 2.0)  # type: ignore[arg-type]
    plan = scheduler.schedule(1.0)
    assert plan is not None
    assert plan.freed_slots


def test_no_async_plan_is_made_while_choices_wait_for_their_prompt() -> None:
    scheduler = Scheduler(limits(async_scheduling=True))
    scheduler.submit(request("a", n=2), 0.0)
    assert scheduler.schedule(1.0)
    assert scheduler.schedule(1.0) is None


def test_a_request_whose_tokens_the_host_must_know_does_not_start_in_an_async_plan() -> None:
    scheduler = Scheduler(limits(async_scheduling=True))
    scheduler.submit(request("plain"), 0.0)
    assert scheduler.schedule(1.0)
    scheduler.submit(request("scored", logprobs=0), 0.0)
    plan = scheduler.schedule(1.0)
    assert plan is not None
    assert not plan.new_sequences
    assert plan.sample_on_device
