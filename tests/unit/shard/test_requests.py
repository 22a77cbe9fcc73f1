from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.shard.admission import MAX_SUBMIT_BYTES, ServedModel
from dataplane.shard.attempts import Ended
from dataplane.shard.requests import (
    LOAD_EVERY_STEPS,
    Instruction,
    RequestBook,
    ToEngine,
    ToGateway,
    ToText,
)
from dataplane.shard.retention import ACKED_S, RETENTION_S
from engine.ipc import wire
from engine.ipc.wire import CancelRequest, Encode, Encoded, Forget, NotEncoded, Step, SubmitRequest
from engine.request import Delta, Load, Refusal, Request, Timing
from phalanx.internal.v1 import shard_pb2
from phalanx.v1 import types_pb2

IDS = types_pb2.TokenIds(ids=[1, 2])
IDLE = Load(kv_blocks_free=10, kv_blocks_total=10)
STOP = types_pb2.FINISH_REASON_STOP
TIMES = Timing(1.0, 2.0, 3.0, 4.0)
MODEL = ServedModel("hash", max_model_len=8, longest_token_bytes=5)


def book(*streams: int, model: ServedModel = MODEL) -> RequestBook:
    requests = RequestBook("d-0", 7, model)
    for stream in streams:
        requests.join(stream)
    return requests


def submit(request_id: str = "r", attempt: int = 1, **fields: object) -> shard_pb2.Submit:
    fields = {"n": 1, "token_ids": IDS} | fields
    return shard_pb2.Submit(request_id=request_id, attempt=attempt, **fields)  # type: ignore[arg-type]


def step(number: int = 1, **news: object) -> Step:
    return Step(number, IDLE, **news)  # type: ignore[arg-type]


def engine(todo: list[Instruction]) -> list[object]:
    return [item.message for item in todo if isinstance(item, ToEngine)]


def text(todo: list[Instruction]) -> list[object]:
    return [item.message for item in todo if isinstance(item, ToText)]


def frames(todo: list[Instruction]) -> list[shard_pb2.StepFrame]:
    return [item.frame for item in todo if isinstance(item, ToGateway)]


def reasons(todo: list[Instruction]) -> list[str]:
    return [failed.error.reason for frame in frames(todo) for failed in frame.failed]


def started(requests: RequestBook, stream: int = 1, **fields: object) -> str:
    """Submit and return the id that the engine knows."""
    return queued(requests, requests.submit(stream, submit(**fields), now=0.0)).id


def asked(todo: list[Instruction]) -> Encode:
    """The message to the text process. The engine gets nothing before the answer."""
    (encode,) = text(todo)
    assert isinstance(encode, Encode)
    assert not any(isinstance(message, SubmitRequest) for message in engine(todo))
    return encode


def queued(requests: RequestBook, todo: list[Instruction], *ids: int) -> Request:
    """The request that the engine gets once the text process has answered."""
    answer = requests.encoded(Encoded(asked(todo).id, ids))
    assert not text(answer)
    (message,) = engine(answer)
    assert isinstance(message, SubmitRequest)
    return message.request


def test_given_ids_go_to_the_engine_once_the_text_process_follows_the_request() -> None:
    requests = book(1)
    todo = requests.submit(1, submit(stopping=types_pb2.Stopping(max_tokens=9, stop=["x"])), now=0.0)
    assert asked(todo) == Encode("1/r/1", max_model_len=8, n=1, stop=("x",))
    request = queued(requests, todo)
    assert (request.id, request.prompt_ids, request.max_tokens) == ("1/r/1", (1, 2), 9)


def test_bad_words_are_tokenised_before_given_ids_go_to_the_engine() -> None:
    requests = book(1)
    sampling, stopping = types_pb2.Sampling(bad_words=["mud"]), types_pb2.Stopping(min_tokens=2)
    encode = asked(requests.submit(1, submit(sampling=sampling, stopping=stopping), now=0.0))
    assert (encode.text, encode.messages, encode.bad_words, encode.min_tokens) == (None, (), ("mud",), 2)
    (message,) = engine(requests.encoded(Encoded(encode.id, (), ((5, 6), (7,)))))
    assert isinstance(message, SubmitRequest)
    assert message.request.prompt_ids == (1, 2)
    assert message.request.sampling.bad_words == ((5, 6), (7,))


def test_a_text_is_tokenised_first() -> None:
    requests = book(1)
    todo = requests.submit(1, submit(text="hello", token_ids=None), now=0.0)
    assert asked(todo).text == "hello"
    assert queued(requests, todo, 5).prompt_ids == (5,)


def test_a_conversation_is_rendered_by_the_text_process() -> None:
    chat = types_pb2.Chat(messages=[types_pb2.ChatMessage(role="user", content="hi")])
    (encode,) = text(book(1).submit(1, submit(chat=chat, token_ids=None), now=0.0))
    assert isinstance(encode, Encode)
    assert encode.messages == (("user", "hi"),)


def test_sampling_keeps_the_defaults_of_what_is_unset_and_the_zeros_that_are_set() -> None:
    sampling = types_pb2.Sampling(temperature=0.0, seed=2**64 - 1)
    requests = book(1)
    request = queued(requests, requests.submit(1, submit(sampling=sampling), now=0.0))
    got = request.sampling
    assert (got.temperature, got.top_p, got.seed) == (0.0, 1.0, 2**64 - 1)
    assert request.logprobs is None


def test_the_same_request_of_two_gateways_has_two_ids() -> None:
    requests = book(1, 2)
    assert started(requests, 1) != started(requests, 2)


def test_prior_output_goes_to_the_engine_and_to_the_text_process() -> None:
    prior = [shard_pb2.Delta(token_ids=[3, 4]), shard_pb2.Delta(choice=1, token_ids=[5], finish_reason=STOP)]
    requests = book(1)
    todo = requests.submit(1, submit(n=2, prior=prior), now=0.0)
    assert (asked(todo).n, asked(todo).prior) == (2, ((3, 4), (5,)))
    request = queued(requests, todo)
    assert (request.prior, request.finished) == (((3, 4), (5,)), (False, True))


def test_a_step_makes_one_frame_for_each_gateway_with_news() -> None:
    requests = book(1, 2)
    one, two = started(requests, 1, request_id="a"), started(requests, 1, request_id="b")
    deltas = (Delta(one, 0, 0, (9,), ("x",)), Delta(two, 0, 0, (8,), ("y",)))
    requests.stepped(step(1), 0.0)
    todo = requests.stepped(step(2, accepted=(one, two), deltas=deltas), 0.0)
    assert [item.stream for item in todo if isinstance(item, ToGateway)] == [1]
    (frame,) = frames(todo)
    assert (frame.replica, frame.epoch, frame.step) == ("d-0", 7, 2)
    assert [list(item.prompt_ids) for item in frame.accepted] == [[1, 2], [1, 2]]
    assert [(item.request_id, list(item.pieces)) for item in frame.deltas] == [("a", ["x"]), ("b", ["y"])]


def test_load_is_sent_when_it_changes_and_now_and_then() -> None:
    requests = book(1)
    assert frames(requests.stepped(step(1), 0.0))
    quiet = [
        number for number in range(2, LOAD_EVERY_STEPS + 2) if frames(requests.stepped(step(number), 0.0))
    ]
    assert quiet == [LOAD_EVERY_STEPS + 1]


def test_the_last_choice_to_end_ends_the_attempt() -> None:
    requests = book(1)
    id = started(requests, n=2)
    last = [Delta(id, choice, 0, (9,), ("x",), finish="length", timing=TIMES) for choice in (0, 1)]
    assert text(requests.stepped(step(1, deltas=(last[0],)), 0.0)) == []
    todo = requests.stepped(step(2, deltas=(last[1],)), 0.0)
    assert text(todo) == [Forget(id)]
    assert not engine(todo)
    assert todo[-1] == Ended("", "r", 1, 2, 2, (TIMES, TIMES), "")
    assert len(requests) == 0


def test_a_stop_text_ends_its_choice_and_later_deltas_of_it_are_dropped() -> None:
    requests = book(1)
    id = started(requests, n=2)
    todo = requests.stepped(step(1, deltas=(Delta(id, 0, 0, (9,), ("",), finish="stop"),)), 0.0)
    assert engine(todo) == [CancelRequest(id, 0)]
    assert len(requests) == 1
    requests.stepped(step(2), 0.0)
    assert not frames(requests.stepped(step(3, deltas=(Delta(id, 0, 1, ()),)), 0.0))


def test_a_stop_text_in_the_last_token_tells_the_engine_nothing() -> None:
    requests = book(1)
    id = started(requests)
    last = Delta(id, 0, 0, (9,), ("",), finish="stop", timing=TIMES)  # both have ended it
    assert not engine(requests.stepped(step(1, deltas=(last,)), 0.0))


def test_a_cancel_ends_the_attempt_everywhere_and_again_does_nothing() -> None:
    requests = book(1)
    id = started(requests)
    todo = requests.cancel(1, "r", 1)
    assert engine(todo) == [CancelRequest(id)]
    assert text(todo) == [Forget(id)]
    assert requests.cancel(1, "r", 1) == []


def test_a_cancel_before_its_submit_is_remembered_for_that_attempt_only() -> None:
    requests = book(1)
    assert requests.cancel(1, "r", 1) == []
    todo = requests.submit(1, submit(), now=0.0)
    assert reasons(todo) == ["CANCELLED"]
    assert not engine(todo)
    assert len(requests) == 0
    assert text(requests.submit(1, submit(attempt=2), now=0.0))


def test_a_cancel_during_tokenisation_keeps_the_engine_out_of_it() -> None:
    requests = book(1)
    (encode,) = text(requests.submit(1, submit(text="hello", token_ids=None), now=0.0))
    assert isinstance(encode, Encode)
    todo = requests.cancel(1, "r", 1)
    assert not engine(todo)
    assert text(todo) == [Forget(encode.id)], "a prompt that waits need not be tokenised"
    assert requests.encoded(Encoded(encode.id, (5,))) == []


def test_a_lost_stream_cancels_its_own_requests() -> None:
    requests = book(1, 2)
    mine = started(requests, 1)
    started(requests, 2)
    assert engine(requests.leave(1, 0.0)) == [CancelRequest(mine)]
    assert requests.leave(1, 0.0) == []
    assert len(requests) == 1


def attached(todo: list[Instruction]) -> list[shard_pb2.Attached]:
    return [item for frame in frames(todo) for item in frame.attached]


def attach(attempt: int = 5, key: str = "k") -> shard_pb2.Attach:
    return shard_pb2.Attach(resume_key=key, attempt=attempt)


def test_an_orphan_goes_on_and_another_gateway_gets_all_of_it() -> None:
    requests = book(1)
    id = started(requests, n=2, resume_key="k", deadline_ms=9000)
    requests.stepped(step(1, deltas=(Delta(id, 0, 0, (9,), ("x",)),)), 0.0)
    assert requests.leave(1, 1.0) == []
    assert not frames(requests.stepped(step(2, deltas=(Delta(id, 0, 1, (8,), ("y",)),)), 1.0))
    requests.stepped(step(2, deltas=(Delta(id, 1, 0, (7,), ("z",), finish="length"),)), 1.0)
    requests.join(2)
    (got,) = attached(requests.attach(2, attach(), 2.0))
    assert got.attempt == got.request.attempt == 5
    assert [list(prior.token_ids) for prior in got.request.prior] == [[9, 8], [7]]
    assert [(prior.request_id, prior.attempt, prior.index) for prior in got.request.prior] == [("", 0, 0)] * 2
    assert [list(prior.pieces) for prior in got.request.prior] == [["x", "y"], ["z"]]
    assert [prior.finish_reason for prior in got.request.prior] == [0, types_pb2.FINISH_REASON_LENGTH]
    assert list(got.request.token_ids.ids) == [1, 2]
    assert (got.request.model_hash, got.request.stopping.max_tokens) == ("hash", 6)
    assert got.request.deadline_ms == 7000
    (frame,) = frames(requests.stepped(step(3, deltas=(Delta(id, 0, 2, (6,), ("w",)),)), 2.0))
    assert [(delta.attempt, delta.index) for delta in frame.deltas] == [(5, 2)]


def test_what_has_no_resume_key_can_be_asked_for_by_nobody() -> None:
    requests = book(1, 2)
    id = started(requests)
    requests.stepped(step(1, deltas=(Delta(id, 0, 0, (9,), ("x",)),)), 0.0)
    asked = shard_pb2.Attach(resume_key=id, attempt=5)
    assert reasons(requests.attach(2, asked, 1.0)) == ["UNKNOWN_REQUEST"]


def test_what_has_finished_is_retained_until_its_client_has_it() -> None:
    requests = book(1, 2)
    id = started(requests, resume_key="k")
    requests.stepped(step(1, deltas=(Delta(id, 0, 0, (9,), ("x",), finish="length"),)), 0.0)
    assert len(requests) == 0
    (got,) = attached(requests.attach(2, attach(), 1.0))
    assert list(got.request.prior[0].token_ids) == [9]
    assert requests.ack("k", 2.0) == requests.ack("k", 3.0) == []
    assert requests.next_timer() == 2.0 + ACKED_S
    assert attached(requests.attach(2, attach(), 3.0)), "what was written may not have arrived"
    requests.ack("k", 4.0)
    requests.expire(4.0 + ACKED_S)
    assert reasons(requests.attach(2, attach(), 4.0 + ACKED_S)) == ["UNKNOWN_REQUEST"]


def test_what_nobody_asks_for_is_dropped_after_a_while() -> None:
    requests = book(1)
    id = started(requests, resume_key="k")
    requests.leave(1, 10.0)
    assert requests.next_timer() == 10.0 + RETENTION_S
    assert requests.expire(9.0 + RETENTION_S) == []
    assert engine(requests.expire(10.0 + RETENTION_S)) == [CancelRequest(id)]
    assert len(requests) == 0


def test_a_gateway_that_comes_back_has_given_up_what_it_had() -> None:
    requests = book()
    requests.join(1, "boot-a")
    id = started(requests, resume_key="k")
    requests.leave(1, 0.0)
    assert not engine(requests.join(2, "boot-b"))
    assert engine(requests.join(3, "boot-a")) == [CancelRequest(id)]


def test_a_gateway_may_come_back_before_its_last_stream_is_known_to_have_ended() -> None:
    requests = book()
    requests.join(1, "boot-a")
    id = started(requests, resume_key="k")
    assert engine(requests.join(2, "boot-a")) == [CancelRequest(id)]
    assert requests.leave(1, 0.0) == []
    requests.check_integrity()
    assert requests.next_timer() is None


def test_a_client_that_went_elsewhere_is_told_to_its_first_gateway() -> None:
    requests = book(1, 2)
    id = started(requests, resume_key="k")
    todo = requests.attach(2, attach(), 0.0)
    assert reasons(todo) == ["TAKEN_OVER"]
    assert [item.stream for item in todo if isinstance(item, ToGateway)] == [1, 2]
    assert requests.cancel(1, "r", 1) == [], "it is no longer the first one's to cancel"
    assert engine(requests.cancel(2, "r", 5)) == [CancelRequest(id)]


def test_a_gateway_that_the_client_has_left_does_not_get_the_request_back() -> None:
    requests = book(1, 2)
    started(requests, resume_key="k")
    (got,) = attached(requests.attach(2, attach(), 0.0))
    assert got.request.takeovers == 1
    assert reasons(requests.submit(1, submit(resume_key="k", attempt=9), now=0.0)) == ["TAKEN_OVER"]
    assert len(requests) == 1


def test_what_is_large_for_its_log_probabilities_can_still_be_replayed() -> None:
    top = types_pb2.TokenLogprob(token_id=1, text="x" * 1000, logprob=-1.0)
    position = types_pb2.PositionLogprobs(chosen=top, top=[top] * 20)
    prior = shard_pb2.Delta(token_ids=[1] * 500, pieces=["x"] * 500, logprobs=[position] * 500)
    large = submit(prior=[prior])
    assert large.ByteSize() > MAX_SUBMIT_BYTES
    assert text(book(1, model=ServedModel("hash", 4096)).submit(1, large, now=0.0))


def test_a_replay_of_what_still_runs_here_takes_its_place() -> None:
    requests = book(1, 2)
    id = started(requests, resume_key="k")
    todo = requests.submit(2, submit(resume_key="k", attempt=9), now=0.0)
    assert reasons(todo) == ["TAKEN_OVER"]
    assert engine(todo) == [CancelRequest(id)]
    assert len(requests) == 1


def test_refusals_end_the_attempt_with_their_reason() -> None:
    requests = book(1)
    id = started(requests)
    todo = requests.stepped(step(1, failed=(Refusal(id, "PROMPT_TOO_LONG", "too long"),)), 0.0)
    assert reasons(todo) == ["PROMPT_TOO_LONG"]
    assert text(todo) == [Forget(id)]
    (encode,) = text(requests.submit(1, submit("s", text="hello", token_ids=None), now=0.0))
    assert isinstance(encode, Encode)
    todo = requests.encoded(NotEncoded(Refusal(encode.id, "NO_CHAT_TEMPLATE", "none")))
    assert reasons(todo) == ["NO_CHAT_TEMPLATE"]
    assert len(requests) == 0


def test_what_cannot_be_an_attempt_is_refused_at_once() -> None:
    done = shard_pb2.Delta(finish_reason=STOP)
    for bad in (
        submit(n=0),
        submit(n=2**32 - 1),
        submit(token_ids=None),
        submit(n=2, prior=[done]),
        submit(prior=[done]),
    ):
        assert reasons(book(1).submit(1, bad, now=0.0)) == ["INVALID_ARGUMENT"]
    assert reasons(book(1).submit(1, submit(model_hash="other"), now=0.0)) == ["MODEL_CHANGED"]


def test_ids_that_leave_no_room_for_one_more_are_refused_at_once() -> None:
    fits, long = (types_pb2.TokenIds(ids=[1] * count) for count in (7, 8))
    assert text(book(1).submit(1, submit(token_ids=fits), now=0.0))
    requests = book(1)
    todo = requests.submit(1, submit(token_ids=long), now=0.0)
    assert reasons(todo) == ["PROMPT_TOO_LONG"]
    assert not engine(todo)
    assert not text(todo)
    (frame,) = frames(todo)
    explanation = "the prompt has 8 tokens; prompt and output together have at most 8"
    assert frame.failed[0].error.message == explanation
    assert len(requests) == 0


def test_a_tokenised_prompt_that_is_too_long_goes_nowhere() -> None:
    requests = book(1)
    (encode,) = text(requests.submit(1, submit(text="hello", token_ids=None), now=0.0))
    assert isinstance(encode, Encode)
    assert encode.max_model_len == 8
    todo = requests.encoded(Encoded(encode.id, (5,) * 8))
    assert reasons(todo) == ["PROMPT_TOO_LONG"]
    assert not engine(todo)
    assert text(todo) == [Forget(encode.id)]
    assert len(requests) == 0


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_prompt_of_more_bytes_than_its_tokens_could_have_is_never_tokenised(kind: str) -> None:
    def ask(said: str) -> shard_pb2.Submit:
        half = len(said) // 2
        chat = [{"role": "a role is no text", "content": part} for part in (said[:half], said[half:])]
        return submit(token_ids=None, **({"text": said} if kind == "text" else {"chat": {"messages": chat}}))

    fits, long = "ж" * 20, "ж" * 20 + "x"  # 40 bytes, which 8 tokens of 5 bytes hold, and one more
    assert text(book(1).submit(1, ask(fits), now=0.0))
    todo = book(1).submit(1, ask(long), now=0.0)
    assert reasons(todo) == ["PROMPT_TOO_LONG"]
    assert not text(todo)
    assert text(book(1, model=ServedModel("hash", 8)).submit(1, ask(long), now=0.0)), "no bound is known"


def test_what_would_break_a_frame_to_a_child_is_refused_whichever_field_it_is_in() -> None:
    unbounded = ServedModel("hash", 1 << 30)
    noise = "\x01" * MAX_SUBMIT_BYTES  # six bytes of JSON each
    for large in (submit(text=noise, token_ids=None), submit(stopping=types_pb2.Stopping(stop=[noise]))):
        assert reasons(book(1, model=unbounded).submit(1, large, now=0.0)) == ["INVALID_ARGUMENT"]


@pytest.mark.parametrize(
    "dense",
    [
        submit(text="\x01" * 10_000, token_ids=None),
        submit(chat=types_pb2.Chat(messages=[types_pb2.ChatMessage()] * 10_000), token_ids=None),
        submit(token_ids=types_pb2.TokenIds(ids=[127] * 10_000)),
        submit(stopping=types_pb2.Stopping(stop=[""] * 10_000)),
        submit(stopping=types_pb2.Stopping(stop=["\x01"] * 10_000, stop_token_ids=[127] * 10_000)),
        submit(n=2, prior=[shard_pb2.Delta(token_ids=[127] * 10_000)] * 2),
    ],
)
def test_what_is_admitted_makes_no_frame_that_is_too_large(dense: shard_pb2.Submit) -> None:
    requests = book(1, model=ServedModel("hash", 1 << 30))
    todo = requests.submit(1, dense, now=0.0)
    todo += requests.encoded(Encoded(asked(todo).id, (1,)))
    messages = [item.message for item in todo if isinstance(item, ToText | ToEngine)]
    assert [type(message) for message in messages] == [Encode, SubmitRequest]
    for message in messages:
        assert len(wire.encode(message)) < wire.MAX_FRAME * dense.ByteSize() / MAX_SUBMIT_BYTES


def test_a_choice_may_end_without_a_token() -> None:
    requests = book(1)
    id = started(requests, prior=[shard_pb2.Delta(token_ids=[3, 4])])
    last = step(1, deltas=(Delta(id, 0, 2, (), finish="length", timing=TIMES),))
    (frame,) = frames(requests.stepped(last, 0.0))
    assert frame.deltas[0].index == 2
    assert not frame.deltas[0].pieces
    assert frame.deltas[0].finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert len(requests) == 0


def test_deadlines_end_attempts_in_their_order() -> None:
    requests = book(1)
    started(requests, request_id="late", deadline_ms=2000)
    soon = started(requests, request_id="soon", deadline_ms=1000)
    started(requests, request_id="never")
    assert requests.next_timer() == 1.0
    assert requests.expire(0.9) == []
    todo = requests.expire(1.0)
    assert reasons(todo) == ["DEADLINE_EXCEEDED"]
    assert engine(todo) == [CancelRequest(soon)]
    assert requests.next_timer() == 2.0
    requests.cancel(1, "late", 1)
    assert requests.next_timer() is None


def test_deadlines_that_pass_together_are_told_in_one_frame() -> None:
    requests = book(1)
    for request_id in ("a", "b"):
        started(requests, request_id=request_id, deadline_ms=1000)
    (frame,) = frames(requests.expire(1.0))
    assert {failed.request_id for failed in frame.failed} == {"a", "b"}


class Conversation(RuleBasedStateMachine):
    """Gateways that come, ask, cancel and go, before an engine and a text process that lag."""

    def __init__(self) -> None:
        super().__init__()
        self.book = RequestBook("d-0", 7, MODEL)
        self.now = 0.0
        self.streams: set[int] = set()
        self.opened = self.submitted = self.steps = 0
        self.encoding: list[str] = []
        self.followed: set[str] = set()  # by the text process
        self.running: dict[str, dict[int, int]] = {}  # what the engine runs: id, choice -> next position
        self.news: dict[str, list[object]] = {"accepted": [], "deltas": [], "failed": []}
        self.with_text: list[Step] = []
        # Per attempt of a gateway: the next position of each live choice.
        self.expected: dict[tuple[int, str, int], dict[int, int]] = {}
        self.over: set[tuple[int, str, int]] = set()
        self.ended: Counter[str] = Counter()
        self.keys: dict[str, str] = {}  # request id: resume key, of those that have one
        self.orphans: set[str] = set()  # request ids
        self.filled: dict[str, list[int]] = {}  # tokens per choice that have got their text
        self.closed: set[tuple[str, int]] = set()  # choices that get no more tokens
        self.attached = 100  # attempt numbers

    def do(self, todo: list[Instruction]) -> None:
        stepped = Counter(item.stream for item in todo if isinstance(item, ToGateway))
        assert max(stepped.values(), default=1) == 1, "two frames of one event for a gateway"
        for item in todo:
            match item:
                case ToText(Encode(id)):
                    assert id not in self.followed
                    self.followed.add(id)
                    self.encoding.append(id)
                case ToText(Forget(id)):
                    self.followed.remove(id)
                case ToEngine(SubmitRequest(request)):
                    assert request.id not in self.encoding, "the engine overtakes the text process"
                    self.running[request.id] = dict.fromkeys(range(request.n), 0)
                    self.news["accepted"].append(request.id)
                case ToEngine(CancelRequest(id, choice)):
                    if choice is None:
                        self.running.pop(id, None)
                    else:
                        self.running.get(id, {}).pop(choice, None)
                case ToGateway(stream, frame):
                    self.receive(stream, frame)
                case Ended(request_id=request_id):
                    self.ended[request_id] += 1
                    self.orphans.discard(request_id)

    def receive(self, stream: int, frame: shard_pb2.StepFrame) -> None:
        for attached in frame.attached:
            prior, request_id = attached.request.prior, attached.request.request_id
            assert [len(choice.token_ids) for choice in prior] == self.filled[request_id]
            key = (stream, request_id, attached.attempt)
            self.orphans.discard(request_id)
            self.expected[key] = {
                choice.choice: len(choice.token_ids) for choice in prior if not choice.finish_reason
            }
            if not self.expected[key]:
                self.over.add(key)
        for accepted in frame.accepted:
            key = (stream, accepted.request_id, accepted.attempt)
            assert key not in self.over
            assert not any(self.expected[key].values()), "accepted after its first token"
        for delta in frame.deltas:
            key = (stream, delta.request_id, delta.attempt)
            assert key not in self.over, "a delta after the end"
            assert self.expected[key].pop(delta.choice) == delta.index, "a position skipped or repeated"
            if not delta.finish_reason:
                self.expected[key][delta.choice] = delta.index + len(delta.token_ids)
            if not self.expected[key]:
                self.over.add(key)
        for failed in frame.failed:
            if not failed.request_id:
                continue  # nothing to attach to
            key = (stream, failed.request_id, failed.attempt)
            assert key not in self.over, "a second end"
            self.over.add(key)

    @rule()
    def join(self) -> None:
        self.opened += 1
        self.streams.add(self.opened)
        self.do(self.book.join(self.opened))

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), n=st.integers(1, 3), as_text=st.booleans(), deadline_ms=st.sampled_from([0, 0, 5]))
    def submit(self, data: st.DataObject, n: int, as_text: bool, deadline_ms: int) -> None:
        stream = data.draw(st.sampled_from(sorted(self.streams)))
        self.submitted += 1
        prompt: dict[str, object] = {"text": "x", "token_ids": None} if as_text else {}
        sent = submit(f"r{self.submitted}", n=n, deadline_ms=deadline_ms, **prompt)
        if data.draw(st.booleans()):
            sent.resume_key = self.keys[sent.request_id] = f"k{self.submitted}"
        self.filled[sent.request_id] = [0] * n
        self.expected[stream, sent.request_id, 1] = dict.fromkeys(range(n), 0)
        self.do(self.book.submit(stream, sent, self.now))

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.expected)))
        if key[0] in self.streams:
            self.over.add(key)
            self.do(self.book.cancel(*key))

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(sorted(self.streams)))
        self.streams.discard(stream)
        mine = {key for key in self.expected if key[0] == stream}
        self.orphans |= {key[1] for key in mine - self.over if key[1] in self.keys}
        self.over |= mine
        self.do(self.book.leave(stream, self.now))

    @precondition(lambda self: self.streams and self.keys)
    @rule(data=st.data())
    def attach(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(sorted(self.streams)))
        request_id, key = data.draw(st.sampled_from(sorted(self.keys.items())))
        if not any(live[:2] == (stream, request_id) for live in self.expected.keys() - self.over):
            self.attached += 1
            self.do(self.book.attach(stream, attach(self.attached, key), self.now))

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        self.do(self.book.ack(data.draw(st.sampled_from(sorted(self.keys.values()))), self.now))

    @rule(elapsed=st.sampled_from([1, 2, 4, 20_000]))
    def wait(self, elapsed: int) -> None:
        self.now += elapsed / 1000
        self.do(self.book.expire(self.now))

    @precondition(lambda self: self.encoding)
    @rule(refused=st.booleans())
    def tokenise(self, refused: bool) -> None:
        id = self.encoding.pop(0)
        answer = NotEncoded(Refusal(id, "INVALID_ARGUMENT", "no")) if refused else Encoded(id, (1,))
        self.do(self.book.encoded(answer))

    @rule(data=st.data())
    def generate(self, data: st.DataObject) -> None:
        self.steps += 1
        deltas = []
        for id, choices in list(self.running.items()):
            for choice, position in list(choices.items()):
                last = data.draw(st.booleans())
                finish, timing = ("length", TIMES) if last else (None, None)
                deltas.append(Delta(id, choice, position, (1,), finish=finish, timing=timing))  # type: ignore[arg-type]
                choices[choice] += 1
                if last:
                    del choices[choice]
        accepted, self.news["accepted"] = tuple(self.news["accepted"]), []
        load = Load(running=len(self.running))
        self.with_text.append(Step(self.steps, load, accepted, tuple(deltas)))  # type: ignore[arg-type]

    @precondition(lambda self: self.with_text)
    @rule(data=st.data())
    def detokenise(self, data: st.DataObject) -> None:
        done = self.with_text.pop(0)
        deltas = []
        for delta in done.deltas:
            stopped = data.draw(st.integers(0, 3)) == 0
            finish = "stop" if stopped else delta.finish
            deltas.append(replace(delta, pieces=("x",), finish=finish))
            request_id = delta.id.split("/")[1]
            if (request_id, delta.choice) not in self.closed:
                self.filled[request_id][delta.choice] += 1
            if finish:
                self.closed.add((request_id, delta.choice))
        self.do(self.book.stepped(Step(done.step, done.load, done.accepted, tuple(deltas)), self.now))

    @invariant()
    def the_book_is_whole(self) -> None:
        self.book.check_integrity()
        live = {key for key in self.expected if key not in self.over}
        assert len(self.book) == len(live) + len(self.orphans)
        assert len(self.followed) == len(self.book), "the text process follows an attempt that is over"
        assert sum(self.ended.values()) == self.submitted - len(self.book)
        assert max(self.ended.values(), default=1) == 1

    @invariant()
    def the_engine_runs_nothing_for_nobody(self) -> None:
        assert {id for id, choices in self.running.items() if choices} <= self.followed


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_every_stream_hears_that_its_leader_lives() -> None:
    requests = book(1, 2)
    todo = requests.heartbeat()
    assert [item.stream for item in todo if isinstance(item, ToGateway)] == [1, 2]
    assert all(isinstance(item, ToGateway) and item.frame.epoch == 7 for item in todo)
