from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dataplane.gateway.journal import EARLY_TOKENS, Journal
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import types_pb2

STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH
LEADER = shard_pb2.LeaderHello(model_hash="m", max_model_len=64, eos_token_ids=[2])


def new(n: int = 1, max_tokens: int = 8, **stopping: object) -> Journal:
    stop = types_pb2.Stopping(max_tokens=max_tokens, **stopping)
    return Journal("demo", shard_pb2.Submit(request_id="r", n=n, text="hello", stopping=stop))


def begun(**options: object) -> Journal:
    journal = new(**options)
    journal.begin(1, "demo-0", LEADER)
    journal.accept([7, 8, 9])
    return journal


def delta(index: int, *ids: int, choice: int = 0, finish: int = 0) -> shard_pb2.Delta:
    return shard_pb2.Delta(
        request_id="r",
        attempt=1,
        choice=choice,
        index=index,
        token_ids=ids,
        pieces=[f"<{i}>" for i in ids],
        finish_reason=finish,
    )


def test_a_delta_that_overlaps_appends_only_what_is_new() -> None:
    journal = begun()
    assert journal.append(delta(0, 10, 11))
    assert journal.append(delta(1, 11, 12))
    assert journal.choices[0].token_ids == [10, 11, 12]
    assert journal.duplicates == 1


def test_a_delta_that_leaves_a_gap_is_refused_whole() -> None:
    journal = begun()
    assert journal.append(delta(0, 10))
    assert not journal.append(delta(2, 12))
    assert journal.choices[0].token_ids == [10]


def test_a_delta_whose_pieces_do_not_match_its_tokens_is_refused() -> None:
    broken = delta(0, 10)
    del broken.pieces[:]
    assert not begun().append(broken)


def test_a_delta_of_a_choice_that_was_not_asked_for_is_refused() -> None:
    assert not begun().append(delta(0, 10, choice=1))


def test_a_replay_carries_prompt_ids_and_prior_output_apart() -> None:
    journal = begun(n=2)
    journal.append(delta(0, 10, 11))
    journal.append(delta(0, 20, choice=1, finish=STOP))
    journal.lose()
    submit = journal.begin(2, "demo-1", LEADER)
    assert list(submit.token_ids.ids) == [7, 8, 9]
    assert [list(prior.token_ids) for prior in submit.prior] == [[10, 11], [20]]
    assert [prior.finish_reason for prior in submit.prior] == [0, STOP]
    assert [list(prior.pieces) for prior in submit.prior] == [["<10>", "<11>"], ["<20>"]]
    assert submit.attempt == 2
    assert submit.model_hash == "m"


def test_a_replay_before_acceptance_sends_the_prompt_as_the_client_gave_it() -> None:
    journal = new()
    journal.begin(1, "demo-0", LEADER)
    journal.lose()
    submit = journal.begin(2, "demo-1", LEADER)
    assert submit.text == "hello"
    assert not submit.prior
    assert submit.model_hash == ""


def test_a_lost_finish_by_length_is_known_here() -> None:
    journal = begun(max_tokens=2)
    journal.append(delta(0, 10, 11))
    journal.lose()
    assert journal.finished
    assert journal.choices[0].finish == LENGTH


def test_a_lost_finish_by_end_of_sequence_is_known_here() -> None:
    journal = begun()
    journal.append(delta(0, 10, 2))
    journal.lose()
    assert journal.choices[0].finish == STOP


def test_end_of_sequence_does_not_end_a_choice_that_ignores_it() -> None:
    journal = begun(ignore_eos=True)
    journal.append(delta(0, 10, 2))
    journal.lose()
    assert not journal.finished


def test_a_budget_left_open_ends_at_the_context_length() -> None:
    journal = begun(max_tokens=0)
    journal.append(delta(0, *range(100, 161)))
    journal.lose()
    assert journal.choices[0].finish == LENGTH


def test_usage_counts_a_replayed_token_once() -> None:
    journal = begun(max_tokens=3)
    journal.append(delta(0, 10, 11))
    journal.lose()
    journal.begin(3, "demo-1", LEADER)
    journal.append(delta(0, 10, 11, 12, finish=LENGTH))
    assert (journal.usage.prompt_tokens, journal.usage.completion_tokens) == (3, 3)


def test_usage_tells_what_was_cached_when_the_first_token_came() -> None:
    journal = begun(max_tokens=3)
    first = delta(0, 10)
    first.cached_tokens = 2
    journal.append(first)
    journal.append(delta(1, 11))
    assert journal.usage.cached_tokens == 2
    journal.lose()
    journal.begin(3, "demo-1", LEADER)
    again = delta(2, 12, finish=LENGTH)
    again.cached_tokens = 3
    journal.append(again)
    assert journal.usage.cached_tokens == 2


def test_attempts_that_come_to_nothing_are_counted_until_one_makes_progress() -> None:
    journal = begun(max_tokens=64)
    journal.lose()
    journal.begin(2, "demo-1", LEADER)
    journal.append(delta(0, *range(10, 9 + EARLY_TOKENS)))
    journal.lose()
    assert journal.early_losses == 2, "a poison may have some tokens in it"
    journal.begin(3, "demo-1", LEADER)
    journal.append(delta(journal.tokens, *range(10, 10 + EARLY_TOKENS)))
    journal.lose()
    assert journal.early_losses == 0


def test_an_error_after_the_end_changes_nothing() -> None:
    journal = begun()
    journal.append(delta(0, 10, finish=STOP))
    journal.fail(PhalanxError("CANCELLED", "late"))
    assert journal.error is None
    assert journal.finished


def test_a_finish_without_a_token_is_delivered_once() -> None:
    journal = begun()
    journal.append(delta(0, 10))
    (first,) = journal.read(journal.start)
    journal.append(delta(1, finish=STOP))
    (second,) = journal.read(first.cursor)
    assert (second.finish, list(second.token_ids)) == (STOP, [])
    assert journal.read(second.cursor) == []


@given(st.data())
def test_any_cut_of_reads_delivers_every_position_exactly_once(data: st.DataObject) -> None:
    ids = {choice: [100 * choice + i for i in range(data.draw(st.integers(1, 9)))] for choice in range(2)}
    journal = begun(n=2)
    cursor, seen = journal.start, {0: [], 1: []}
    finishes = 0
    pending = dict.fromkeys(ids, 0)
    while pending:
        choice = data.draw(st.sampled_from(sorted(pending)))
        at = pending[choice]
        size = data.draw(st.integers(1, 3))
        end = at + size >= len(ids[choice])
        assert journal.append(
            delta(at, *ids[choice][at : at + size], choice=choice, finish=STOP if end else 0)
        )
        pending[choice] = at + size
        if end:
            del pending[choice]
        if data.draw(st.booleans()) or not pending:
            for chunk in journal.read(cursor):
                assert chunk.index == len(seen[chunk.choice])
                assert chunk.text == "".join(f"<{i}>" for i in chunk.token_ids)
                seen[chunk.choice] += chunk.token_ids
                finishes += chunk.finish == STOP
                cursor = chunk.cursor
    assert seen == ids
    assert finishes == 2


def test_a_budget_left_open_is_pinned_at_acceptance() -> None:
    journal = begun(max_tokens=0)
    journal.append(delta(0, *range(100, 130)))
    journal.lose()
    smaller = shard_pb2.LeaderHello(model_hash="m", max_model_len=32)
    assert not journal.finished
    assert journal.begin(2, "demo-1", smaller).stopping.max_tokens == 61
    assert journal.length == 64


def test_an_attempt_that_the_topology_ended_is_not_held_against_the_request() -> None:
    journal = begun()
    journal.lose(blame=False)
    assert journal.early_losses == 0


def test_log_probabilities_of_the_prompt_are_asked_for_until_they_are_there() -> None:
    submit = shard_pb2.Submit(request_id="r", n=2, text="hello", prompt_logprobs=1)
    submit.stopping.max_tokens = 8
    journal = Journal("demo", submit)
    assert journal.begin(1, "demo-0", LEADER).prompt_logprobs == 1
    journal.accept([7, 8])
    assert journal.append(delta(0, 20, choice=1))
    journal.lose()
    assert journal.begin(1, "demo-1", LEADER).HasField("prompt_logprobs"), "choice 0 has not begun"
    first = delta(0, 10)
    first.prompt_logprobs.add().chosen.token_id = 8
    assert journal.append(first)
    journal.lose()
    assert not journal.begin(1, "demo-2", LEADER).HasField("prompt_logprobs")
    assert journal.append(delta(1, 11))
    chunks = journal.read(journal.start)
    assert [[entry.chosen.token_id for entry in chunk.prompt_logprobs] for chunk in chunks] == [[8], []]
    assert all(not chunk.prompt_logprobs for chunk in journal.read((1, 0)))


def test_a_journal_comes_back_whole_from_what_a_replay_sends() -> None:
    journal = begun(n=2)
    journal.append(delta(0, 10, 11))
    journal.append(delta(0, 20, choice=1, finish=STOP))
    journal.lose()
    sent = journal.begin(2, "demo-1", LEADER)
    again = Journal.restore("demo", sent, LEADER.eos_token_ids)
    assert again.choices == journal.choices
    assert again.usage == journal.usage
    assert again.pinned() == journal.pinned()
    assert (again.accepted, again.attempt, again.length) == (True, None, journal.length)
    again.adopt(7, "demo-1", LEADER)
    assert again.is_current(7)
    again.append(delta(2, 2, finish=STOP))
    assert again.finished


def test_parts_of_a_journal_make_the_whole() -> None:
    journal = begun(max_tokens=64)
    parts = []
    for index in range(5):
        journal.append(delta(2 * index, 10 + index, 20 + index))
        parts += journal.since((2 * index,))
    again = Journal.restore("demo", journal.pinned(), [])
    assert all(again.append(part) for part in parts)
    assert again.choices == journal.choices


def test_a_reader_that_is_ahead_of_the_journal_waits_for_it() -> None:
    journal = begun()
    journal.append(delta(0, 10, 11))
    assert journal.read((3,)) == []
    journal.append(delta(2, 12, 13))
    (chunk,) = journal.read((3,))
    assert (chunk.index, chunk.token_ids) == (3, [13])
