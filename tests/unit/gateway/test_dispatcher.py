"""The dispatcher under generated orders of events: each client gets exactly the tokens of its request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from dataplane.gateway import instructions
from dataplane.gateway.dispatcher import MAX_EARLY_LOSSES, PLACEMENT_TIMEOUT_S, Dispatcher
from dataplane.gateway.journal import Journal
from dataplane.gateway.router import Target
from dataplane.gateway.search import SEARCH_TIMEOUT_S
from dataplane.gateway.silence import SILENCE_TIMEOUT_S
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import types_pb2

LEADER = shard_pb2.LeaderHello(model_hash="m", max_model_len=1024)


def key_of(request_id: str) -> str:
    return f"key of {request_id}"


def journal(request_id: str, n: int = 1, max_tokens: int = 6, resume_key: str = "") -> Journal:
    stopping = types_pb2.Stopping(max_tokens=max_tokens)
    submit = shard_pb2.Submit(
        request_id=request_id, n=n, text="x", stopping=stopping, resume_key=resume_key
    )  # fmt: skip
    return Journal("demo", submit)


def token(request_id: str, choice: int, position: int) -> int:
    """The model: what any replica generates here."""
    return sum(request_id.encode()) * 7 + choice * 131 + position * 17


def output(submit: shard_pb2.Submit, choice: int, begin: int, end: int) -> dict[str, Any]:
    """The fields of a delta with a choice's positions from `begin` to `end`."""
    ids = [token(submit.request_id, choice, i) for i in range(begin, end)]
    is_last = end == submit.stopping.max_tokens
    return {
        "index": begin,
        "token_ids": ids,
        "pieces": [f"{i} " for i in ids],
        "finish_reason": types_pb2.FINISH_REASON_LENGTH if is_last else types_pb2.FINISH_REASON_UNSPECIFIED,
    }


NAMES = st.sampled_from(["demo-0", "demo-1", "demo-2"])
ORPHAN = 0
"""The attempt number of a request that another gateway began and no gateway has attached."""


@dataclass
class FakeReplica:
    """A leader that runs attempts as the real one would, also those that another gateway began."""

    target: Target
    up: bool = False
    step: int = 0
    attempts: dict[tuple[str, int], shard_pb2.Submit] = field(default_factory=dict)
    made: dict[tuple[str, int], list[int]] = field(default_factory=dict)  # positions made per choice
    answers: shard_pb2.StepFrame = field(default_factory=shard_pb2.StepFrame)  # they go with the next step

    def submit(self, message: shard_pb2.Submit) -> None:
        if message.resume_key and (older := self.holding(message.resume_key)):
            self.drop(*older)
        key = (message.request_id, message.attempt)
        self.attempts[key] = message
        self.made[key] = [len(prior.token_ids) for prior in message.prior] or [0] * message.n

    def drop(self, request_id: str, attempt: int) -> None:
        self.attempts.pop((request_id, attempt), None)
        self.made.pop((request_id, attempt), None)

    def holding(self, resume_key: str) -> tuple[str, int] | None:
        """The attempt that has this key."""
        return next((key for key, one in self.attempts.items() if one.resume_key == resume_key), None)

    def renumber(self, key: tuple[str, int], attempt: int) -> None:
        """Give an attempt the number that another gateway chose."""
        submit, made = self.attempts.pop(key), self.made.pop(key)
        submit.attempt = attempt
        self.attempts[key[0], attempt], self.made[key[0], attempt] = submit, made

    def frame(self, sizes: list[int]) -> shard_pb2.StepFrame:
        """One step: answers first, then every attempt moves on by up to `sizes` tokens per choice."""
        self.step += 1
        frame = shard_pb2.StepFrame(replica=self.target.replica, epoch=self.target.epoch, step=self.step)
        frame.load.running = len(self.attempts)
        frame.MergeFrom(self.answers)
        self.answers = shard_pb2.StepFrame()
        for number, (key, submit) in enumerate(list(self.attempts.items())):
            is_orphan = key[1] == ORPHAN
            if not is_orphan:
                frame.accepted.add(request_id=key[0], attempt=key[1], prompt_ids=[1, 2, 3])
            budget = submit.stopping.max_tokens
            for choice, made in enumerate(self.made[key]):
                size = min(sizes[(number + choice) % len(sizes)], budget - made)
                if size <= 0:
                    continue
                if not is_orphan:
                    fields = output(submit, choice, made, made + size)
                    frame.deltas.add(request_id=key[0], attempt=key[1], choice=choice, **fields)
                self.made[key][choice] = made + size
            if min(self.made[key]) == budget and not is_orphan:
                self.drop(*key)
        return frame

    def attach(self, attach: shard_pb2.Attach) -> None:
        key = self.holding(attach.resume_key)
        if key is None:
            self.answers.failed.add(attempt=attach.attempt, error=types_pb2.Error(reason="UNKNOWN_REQUEST"))
            return
        self.renumber(key, attach.attempt)
        key = (key[0], attach.attempt)
        request = shard_pb2.Submit.FromString(self.attempts[key].SerializeToString())
        request.token_ids.ids[:] = [1, 2, 3]
        request.model_hash = "m"
        del request.prior[:]
        for choice, made in enumerate(self.made[key]):
            request.prior.add(choice=choice, **output(request, choice, 0, made))
        self.answers.attached.add(attempt=attach.attempt, request=request)


class Cluster(RuleBasedStateMachine):
    """Three replicas that come, go and repeat themselves; clients that come, go, and move between gateways.

    The dispatcher is one gateway's. Other gateways only leave requests on replicas, and take some.
    """

    requests, orphans = Bundle("requests"), Bundle("orphans")

    @initialize()
    def start(self) -> None:
        self.now = 0.0
        self.dispatcher = Dispatcher()
        self.replicas = {f"demo-{i}": FakeReplica(Target(f"demo-{i}", 1, "demo", "a:1")) for i in range(3)}
        self.begun: dict[str, tuple[int, int]] = {}  # every request, of any gateway: choices, tokens
        self.journals: dict[str, Journal] = {}  # those of this gateway
        self.cancelled: set[str] = set()
        self.searched: set[str] = set()  # requests for which a search runs
        self.asked: dict[str, set[Target]] = {}  # by resume key: replicas that were asked
        self.past: list[tuple[Target, shard_pb2.StepFrame]] = []
        for name in ("demo-0", "demo-1"):
            self.up(name)

    def do(self, todo: list[instructions.Instruction]) -> None:
        for instruction in todo:
            match instruction:
                case instructions.Submit(target, _, message, _):
                    self.at(target).submit(message)
                case instructions.CancelAttempt(target, message):
                    self.replicas[target.replica].drop(message.request_id, message.attempt)
                case instructions.Attach(target, message):
                    self.at(target).attach(message)
                    self.asked.setdefault(message.resume_key, set()).add(target)
                case instructions.Found(_, journal):
                    self.searched.remove(journal.request_id)
                    self.asked.pop(journal.resume_key)
                    self.adopted(journal)
                case instructions.NotHeld(resume_key, certain):
                    self.searched.remove(resume_key.removeprefix(key_of("")))
                    asked = self.asked.pop(resume_key, set())
                    holders = [
                        replica.target
                        for replica in self.replicas.values()
                        if replica.target in asked and replica.holding(resume_key)
                    ]
                    assert not certain or not holders, (
                        "certain, and a replica that was asked holds the request"
                    )
                case instructions.CloseSilent(target, reason):
                    self.replicas[target.replica] = FakeReplica(target)
                    self.do(self.dispatcher.stream_down(target, reason, self.now))
                case instructions.Distrust():
                    raise AssertionError("an honest replica was distrusted")

    def at(self, target: Target) -> FakeReplica:
        replica = self.replicas[target.replica]
        assert replica.up
        assert replica.target == target, "a message to an epoch that is over"
        return replica

    def adopted(self, journal: Journal) -> None:
        self.journals[journal.request_id] = journal
        self.cancelled.discard(journal.request_id)

    def is_live(self, request_id: str) -> bool:
        return request_id in self.journals and not self.journals[request_id].closed

    @rule(target=requests, n=st.integers(1, 2), max_tokens=st.integers(1, 6))
    def open(self, n: int, max_tokens: int) -> str:
        request_id = f"r{len(self.begun)}"
        self.begun[request_id] = n, max_tokens
        self.journals[request_id] = journal(request_id, n, max_tokens, key_of(request_id))
        self.do(self.dispatcher.open(self.journals[request_id], self.now))
        return request_id

    @rule(
        target=orphans,
        copies=st.sampled_from([1, 1, 2, 0]),
        n=st.integers(1, 2),
        made=st.integers(0, 6),
        comes_at_once=st.booleans(),
    )
    def orphan(self, copies: int, n: int, made: int, comes_at_once: bool) -> str:
        """Another gateway has died: some replicas hold its request, and its client comes at once or later."""
        request_id = f"r{len(self.begun)}"
        self.begun[request_id] = n, 6
        for replica in [replica for replica in self.replicas.values() if replica.up][:copies]:
            replica.submit(journal(request_id, n, 6, key_of(request_id)).template)
            replica.made[request_id, ORPHAN] = [made] * n
        if comes_at_once:
            self.resume(request_id)
        return request_id

    @rule(request_id=orphans | requests)
    def resume(self, request_id: str) -> None:
        """A client comes with a resume token; the gateway searches if it does not have the request."""
        if self.is_live(request_id):
            return
        again = request_id in self.searched
        self.searched.add(request_id)
        todo = self.dispatcher.seek("demo", key_of(request_id), self.now)
        assert not (again and todo)
        self.do(todo)

    @rule(request_id=orphans | requests, data=st.data())
    def adopt(self, request_id: str, data: st.DataObject) -> None:
        """No replica has answered in time that it holds the request: its checkpoint restores it."""
        if self.is_live(request_id) or request_id in self.searched:
            return
        n, max_tokens = self.begun[request_id]
        submit = journal(request_id, n, max_tokens, key_of(request_id)).template
        submit.token_ids.ids[:] = [1, 2, 3]
        for choice in range(n):
            made = data.draw(st.integers(0, max_tokens - 1))
            submit.prior.add(choice=choice, **output(submit, choice, 0, made))
        restored = Journal.restore("demo", submit, ())
        self.adopted(restored)
        self.do(self.dispatcher.adopt(restored, self.now))

    @rule(request_id=orphans | requests)
    def displace(self, request_id: str) -> None:
        """The client goes to another gateway, which attaches the attempt to its own stream."""
        live = self.journals.get(request_id)
        if live is None or live.attempt is None or not live.accepted:
            return
        replica, key = self.replicas[live.attempt.replica], (request_id, live.attempt.number)
        if key not in replica.attempts:
            return  # its last delta is on the way
        replica.renumber(key, ORPHAN)
        frame = shard_pb2.StepFrame(replica=replica.target.replica, epoch=replica.target.epoch)
        displaced = types_pb2.Error(reason="TAKEN_OVER", message="the client has gone to another gateway")
        frame.failed.add(request_id=request_id, attempt=key[1], error=displaced)
        self.do(self.dispatcher.frame(replica.target, frame, self.now))
        assert live.closed

    @rule(request_id=requests)
    def cancel(self, request_id: str) -> None:
        found, todo = self.dispatcher.cancel(request_id)
        if found:
            self.cancelled.add(request_id)
        self.do(todo)

    @rule(name=NAMES)
    def up(self, name: str) -> None:
        replica = self.replicas[name]
        if not replica.up:
            replica.up = True
            # A gateway that comes back has given up its earlier attempts.
            for key in [key for key in replica.attempts if key[1] != ORPHAN]:
                replica.drop(*key)
            self.do(self.dispatcher.stream_up(replica.target, LEADER, self.now))

    @rule(name=NAMES, how=st.sampled_from(["killed", "formed again", "cut"]))
    def down(self, name: str, how: str) -> None:
        replica = self.replicas[name]
        if not replica.up:
            return
        target = replica.target
        if how == "cut":
            # The replica runs on with its attempts.
            replica.up, replica.answers = False, shard_pb2.StepFrame()
        else:
            epoch = target.epoch + (how == "formed again")
            self.replicas[name] = FakeReplica(Target(name, epoch, "demo", "a:1"), step=replica.step)
        self.do(self.dispatcher.stream_down(target, how, self.now))

    @rule(name=NAMES, sizes=st.lists(st.integers(0, 3), min_size=1))
    def step(self, name: str, sizes: list[int]) -> None:
        replica = self.replicas[name]
        if replica.up:
            frame = replica.frame(sizes)
            self.past.append((replica.target, frame))
            self.do(self.dispatcher.frame(replica.target, frame, self.now))

    @precondition(lambda self: self.past)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """A frame arrives again, from a stream that may be long gone."""
        target, frame = data.draw(st.sampled_from(self.past))
        self.do(self.dispatcher.frame(target, frame, self.now))

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.dispatcher.tick(self.now))

    @rule()
    def search_times_out(self) -> None:
        for _ in range(int(SEARCH_TIMEOUT_S / 0.25) + 1):
            self.wait(0.25)
        assert not self.searched

    @invariant()
    def every_journal_is_a_prefix_of_its_own_stream(self) -> None:
        for request_id, live in self.journals.items():
            for number, choice in enumerate(live.choices):
                assert choice.token_ids == [
                    token(request_id, number, i) for i in range(len(choice.token_ids))
                ]

    @invariant()
    def the_books_balance(self) -> None:
        self.dispatcher.check_integrity()

    def teardown(self) -> None:
        """When the faults stop, every stream that was not cancelled ends, whole or with a typed error."""
        for _ in range(MAX_EARLY_LOSSES + 1):
            for name in self.replicas:
                self.up(name)
                for _ in range(7):
                    self.step(name, [1])
        assert self.dispatcher.live == 0
        assert not self.searched, "a client waits for ever"
        for request_id, live in self.journals.items():
            assert live.closed
            if live.error is None:
                _, max_tokens = self.begun[request_id]
                assert all(len(choice.token_ids) == max_tokens for choice in live.choices)
            elif request_id in self.cancelled:
                assert live.error.reason == "CANCELLED"
            else:
                assert live.error.reason in ("ATTEMPTS_EXHAUSTED", "NO_REPLICA", "TAKEN_OVER")


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


UP = Target("demo-0", 1, "demo", "a:1")


def test_a_live_id_cannot_be_taken_twice() -> None:
    dispatcher = Dispatcher()
    dispatcher.open(journal("r"), 0.0)
    with pytest.raises(PhalanxError) as caught:
        dispatcher.open(journal("r"), 0.0)
    assert caught.value.reason == "DUPLICATE_REQUEST"


def test_a_request_waits_for_the_first_replica() -> None:
    dispatcher = Dispatcher()
    assert dispatcher.open(journal("r"), 0.0) == []
    (submit,) = dispatcher.stream_up(UP, LEADER, 1.0)
    assert isinstance(submit, instructions.Submit)


def test_a_request_that_finds_no_replica_is_told_so() -> None:
    dispatcher, request = Dispatcher(), journal("r")
    dispatcher.open(request, 0.0)
    dispatcher.tick(PLACEMENT_TIMEOUT_S)
    assert request.error is not None
    assert request.error.reason == "NO_REPLICA"
    assert request.error.retryable


def test_a_deadline_ends_a_running_request_and_cancels_its_attempt() -> None:
    dispatcher, request = Dispatcher(), journal("r")
    dispatcher.stream_up(UP, LEADER, 0.0)
    dispatcher.open(request, 0.0, timeout_s=1.0)
    assert ticks(dispatcher, 0.0, 0.9) == []
    assert any(isinstance(todo, instructions.CancelAttempt) for todo in dispatcher.tick(2.0))
    assert request.error is not None
    assert request.error.reason == "DEADLINE_EXCEEDED"


def ticks(dispatcher: Dispatcher, start: float, end: float) -> list[instructions.Instruction]:
    """Tick as the gateway does."""
    times = [start + i * 0.05 for i in range(int((end - start) / 0.05) + 1)]
    return [todo for now in times for todo in dispatcher.tick(now)]


def test_a_stream_that_falls_silent_is_closed_once() -> None:
    dispatcher = Dispatcher()
    dispatcher.stream_up(UP, LEADER, 0.0)
    assert ticks(dispatcher, 0.0, 1.0) == []
    beat = shard_pb2.StepFrame(replica="demo-0", epoch=1)
    assert dispatcher.frame(UP, beat, 1.0) == []
    assert ticks(dispatcher, 1.0, 1.0 + SILENCE_TIMEOUT_S - 0.1) == []
    (close,) = ticks(dispatcher, 1.0 + SILENCE_TIMEOUT_S - 0.1, 5.0)
    assert close == instructions.CloseSilent(UP, f"silent for {SILENCE_TIMEOUT_S} s")
    dispatcher.check_integrity()


def test_a_gateway_that_stood_still_itself_closes_no_stream() -> None:
    dispatcher = Dispatcher()
    dispatcher.stream_up(UP, LEADER, 0.0)
    ticks(dispatcher, 0.0, 0.5)
    assert dispatcher.tick(60.0) == []
    assert dispatcher.frame(UP, shard_pb2.StepFrame(replica="demo-0", epoch=1), 60.0) == []
    assert ticks(dispatcher, 60.0, 61.0) == []


def test_a_refusal_that_cannot_be_retried_ends_the_request() -> None:
    dispatcher, request = Dispatcher(), journal("r")
    dispatcher.stream_up(UP, LEADER, 0.0)
    dispatcher.open(request, 0.0)
    frame = shard_pb2.StepFrame(replica="demo-0", epoch=1)
    frame.failed.add(request_id="r", attempt=1, error=types_pb2.Error(reason="PROMPT_TOO_LONG", message="no"))
    dispatcher.frame(UP, frame, 0.0)
    assert request.error is not None
    assert request.error.reason == "PROMPT_TOO_LONG"


def test_a_request_that_kills_replicas_is_given_up() -> None:
    dispatcher, request = Dispatcher(), journal("r")
    dispatcher.open(request, 0.0)
    for epoch in range(1, MAX_EARLY_LOSSES + 1):
        target = Target("demo-0", epoch, "demo", "a:1")
        dispatcher.stream_up(target, LEADER, 0.0)
        dispatcher.stream_down(target, "engine died", 0.0)
    assert request.error is not None
    assert request.error.reason == "ATTEMPTS_EXHAUSTED"


def test_a_replay_goes_only_to_the_very_same_model() -> None:
    dispatcher, request = Dispatcher(), journal("r")
    dispatcher.stream_up(UP, LEADER, 0.0)
    dispatcher.open(request, 0.0)
    frame = shard_pb2.StepFrame(replica="demo-0", epoch=1)
    frame.accepted.add(request_id="r", attempt=1, prompt_ids=[1])
    dispatcher.frame(UP, frame, 0.0)
    other = Target("demo-1", 1, "demo", "a:2")
    dispatcher.stream_up(other, shard_pb2.LeaderHello(model_hash="another"), 0.0)
    assert not any(
        isinstance(todo, instructions.Submit) for todo in dispatcher.stream_down(UP, "killed", 0.0)
    )
    same = Target("demo-2", 1, "demo", "a:3")
    assert any(isinstance(todo, instructions.Submit) for todo in dispatcher.stream_up(same, LEADER, 0.0))


def test_a_replica_that_skips_a_position_is_distrusted() -> None:
    dispatcher = Dispatcher()
    dispatcher.stream_up(UP, LEADER, 0.0)
    dispatcher.open(journal("r"), 0.0)
    frame = shard_pb2.StepFrame(replica="demo-0", epoch=1)
    frame.deltas.add(request_id="r", attempt=1, index=3, token_ids=[9], pieces=["x"])
    assert any(isinstance(todo, instructions.Distrust) for todo in dispatcher.frame(UP, frame, 0.0))


def test_the_least_loaded_replica_is_picked() -> None:
    dispatcher = Dispatcher()
    other = Target("demo-1", 1, "demo", "a:2")
    dispatcher.stream_up(UP, LEADER, 0.0)
    dispatcher.stream_up(other, LEADER, 0.0)
    busy = shard_pb2.StepFrame(replica="demo-0", epoch=1, load=shard_pb2.Load(running=3))
    dispatcher.frame(UP, busy, 0.0)
    (submit,) = dispatcher.open(journal("r"), 0.0)
    assert isinstance(submit, instructions.Submit)
    assert submit.target == other


def test_a_delta_of_an_attempt_that_was_given_up_is_dropped() -> None:
    dispatcher, request = Dispatcher(), journal("r")
    dispatcher.stream_up(UP, LEADER, 0.0)
    dispatcher.open(request, 0.0)
    refused = shard_pb2.StepFrame(replica="demo-0", epoch=1)
    refused.failed.add(request_id="r", attempt=1, error=types_pb2.Error(reason="INTERNAL", retryable=True))
    dispatcher.frame(UP, refused, 0.0)
    late = shard_pb2.StepFrame(replica="demo-0", epoch=1)
    late.deltas.add(request_id="r", attempt=1, index=0, token_ids=[9], pieces=["x"])
    dispatcher.frame(UP, late, 0.0)
    assert request.attempts == 2
    assert request.tokens == 0
    assert dispatcher.counters.stale_frames_dropped == 1


def test_a_replay_goes_only_where_its_tokens_fit() -> None:
    dispatcher, request = Dispatcher(), journal("r", max_tokens=600)
    dispatcher.stream_up(UP, LEADER, 0.0)
    dispatcher.open(request, 0.0)
    frame = shard_pb2.StepFrame(replica="demo-0", epoch=1)
    frame.accepted.add(request_id="r", attempt=1, prompt_ids=[1])
    dispatcher.frame(UP, frame, 0.0)
    small = shard_pb2.LeaderHello(model_hash="m", max_model_len=512)
    dispatcher.stream_up(Target("demo-1", 1, "demo", "a:2"), small, 0.0)
    assert not any(
        isinstance(todo, instructions.Submit) for todo in dispatcher.stream_down(UP, "killed", 0.0)
    )


def test_a_deadline_that_the_replica_saw_first_is_no_failover() -> None:
    dispatcher, request = Dispatcher(), journal("r")
    dispatcher.stream_up(UP, LEADER, 0.0)
    dispatcher.open(request, 0.0, timeout_s=1.0)
    frame = shard_pb2.StepFrame(replica="demo-0", epoch=1)
    late = types_pb2.Error(reason="DEADLINE_EXCEEDED", message="late", retryable=True)
    frame.failed.add(request_id="r", attempt=1, error=late)
    dispatcher.frame(UP, frame, 0.99)
    assert request.error is not None
    assert request.error.reason == "DEADLINE_EXCEEDED"
    assert dispatcher.counters.failovers == 0


def test_an_id_used_again_is_another_attempt() -> None:
    dispatcher = Dispatcher()
    dispatcher.stream_up(UP, LEADER, 0.0)
    (first,) = dispatcher.open(journal("r"), 0.0)
    dispatcher.cancel("r")
    (second,) = dispatcher.open(journal("r"), 0.0)
    assert isinstance(first, instructions.Submit)
    assert isinstance(second, instructions.Submit)
    assert second.message.attempt != first.message.attempt


def test_rolling_replicas_never_use_up_the_attempts_of_a_request_that_waits() -> None:
    dispatcher, request = Dispatcher(), journal("r")
    dispatcher.open(request, 0.0)
    for epoch in range(1, 3 * MAX_EARLY_LOSSES):
        target = Target("demo-0", epoch, "demo", "a:1")
        dispatcher.stream_up(target, LEADER, 0.0)
        dispatcher.stream_down(target, "the replica has left the topology", 0.0, blame=False)
    assert request.error is None


OTHER = Target("demo-1", 1, "demo", "a:2")
KEY = "k" * 32


def attached(tokens: int, attempt: int, *, finished: bool = False) -> shard_pb2.Attached:
    """The answer of a leader that holds request "r"."""
    request = shard_pb2.Submit(
        request_id="r", attempt=attempt, resume_key=KEY, n=1, token_ids=types_pb2.TokenIds(ids=[1, 2]),
        stopping=types_pb2.Stopping(max_tokens=6), model_hash="m", deadline_ms=5000,
    )  # fmt: skip
    ids = [token("r", 0, i) for i in range(tokens)]
    request.prior.add(token_ids=ids, pieces=[f"{i} " for i in ids], finish_reason=2 if finished else 0)
    return shard_pb2.Attached(attempt=attempt, request=request)


def sought() -> tuple[Dispatcher, list[shard_pb2.Attach]]:
    dispatcher = Dispatcher()
    dispatcher.stream_up(UP, LEADER, 0.0)
    dispatcher.stream_up(OTHER, LEADER, 0.0)
    dispatcher.stream_up(Target("else-0", 1, "else", "a:3"), LEADER, 0.0)
    asked = dispatcher.seek("demo", KEY, 0.0)
    assert [todo.target for todo in asked if isinstance(todo, instructions.Attach)] == [UP, OTHER]
    return dispatcher, [todo.message for todo in asked if isinstance(todo, instructions.Attach)]


def test_what_a_replica_holds_goes_on_here() -> None:
    dispatcher, (first, second) = sought()
    frame = shard_pb2.StepFrame(replica="demo-1", epoch=1, attached=[attached(3, second.attempt)])
    (found,) = dispatcher.frame(OTHER, frame, 1.0)
    assert isinstance(found, instructions.Found)
    assert (found.target, found.journal.tokens) == (OTHER, 3)
    no = types_pb2.Error(reason="UNKNOWN_REQUEST")
    late = shard_pb2.StepFrame(replica="demo-0", epoch=1)
    late.failed.add(attempt=first.attempt, error=no)
    assert dispatcher.frame(UP, late, 1.0) == []
    dispatcher.check_integrity()
    news = shard_pb2.StepFrame(replica="demo-1", epoch=1)
    news.deltas.add(request_id="r", attempt=second.attempt, index=3, token_ids=[9], pieces=["x"])
    dispatcher.frame(OTHER, news, 1.0)
    assert found.journal.tokens == 4
    _, submit = dispatcher.stream_down(OTHER, "killed", 2.0)
    assert isinstance(submit, instructions.Submit)
    assert submit.target == UP
    assert len(submit.message.prior[0].token_ids) == 4
    assert submit.message.deadline_ms == 4000
    dispatcher.check_integrity()


def test_what_has_finished_is_found_and_not_live() -> None:
    dispatcher, (first, _) = sought()
    frame = shard_pb2.StepFrame(
        replica="demo-0", epoch=1, attached=[attached(6, first.attempt, finished=True)]
    )
    (found,) = dispatcher.frame(UP, frame, 1.0)
    assert isinstance(found, instructions.Found)
    assert found.journal.finished
    assert dispatcher.live == 0
    dispatcher.check_integrity()


def test_a_search_ends_when_the_last_replica_has_said_no() -> None:
    dispatcher, (first, second) = sought()
    for target, asked in ((UP, first), (OTHER, second)):
        frame = shard_pb2.StepFrame(replica=target.replica, epoch=1)
        frame.failed.add(attempt=asked.attempt, error=types_pb2.Error(reason="UNKNOWN_REQUEST"))
        todo = dispatcher.frame(target, frame, 0.5)
    assert todo == [instructions.NotHeld(KEY)]
    assert dispatcher.tick(0.6) == []


def test_a_search_does_not_wait_for_a_replica_that_is_silent_or_gone() -> None:
    dispatcher, (first, _) = sought()
    assert dispatcher.stream_down(OTHER, "killed", 0.1) == []
    assert ticks(dispatcher, 0.0, SEARCH_TIMEOUT_S + 0.1) == [instructions.NotHeld(KEY, certain=False)]
    # A late answer: no client waits for it any more. No cancel: the replica may have the only copy.
    frame = shard_pb2.StepFrame(replica="demo-0", epoch=1, attached=[attached(3, first.attempt)])
    assert dispatcher.frame(UP, frame, SEARCH_TIMEOUT_S) == []
    assert dispatcher.seek("nobody", KEY, 2.0) == [instructions.NotHeld(KEY, certain=False)]


def test_a_gateway_that_stood_still_gives_up_no_search() -> None:
    dispatcher, (first, _) = sought()
    ticks(dispatcher, 0.0, 0.2)
    assert dispatcher.tick(30.0) == []
    frame = shard_pb2.StepFrame(replica="demo-0", epoch=1, attached=[attached(3, first.attempt)])
    (found,) = dispatcher.frame(UP, frame, 30.0)
    assert isinstance(found, instructions.Found)


def test_of_two_replicas_that_hold_a_request_one_goes_on() -> None:
    dispatcher, (first, second) = sought()
    for target, asked in ((UP, first), (OTHER, second)):
        frame = shard_pb2.StepFrame(replica=target.replica, epoch=1, attached=[attached(3, asked.attempt)])
        (todo,) = dispatcher.frame(target, frame, 0.1)
    assert isinstance(todo, instructions.CancelAttempt)
    assert todo.target == OTHER
    dispatcher.check_integrity()


def test_whose_time_is_up_first_is_placed_first() -> None:
    dispatcher = Dispatcher()
    for name, timeout_s in (("never", None), ("late", 9.0), ("soon", 2.0)):
        dispatcher.open(journal(name), 0.0, timeout_s)
    placed = [todo.journal.request_id for todo in dispatcher.stream_up(UP, LEADER, 1.0)]  # type: ignore[union-attr]
    assert placed == ["soon", "late", "never"]


def test_what_the_cluster_could_not_keep_is_counted_as_lost() -> None:
    dispatcher = Dispatcher()
    dispatcher.stream_up(UP, LEADER, 0.0)
    for name, ended in (("kept", None), ("lost", "INTERNAL"), ("moved", "TAKEN_OVER")):
        request = journal(name)
        (submit,) = dispatcher.open(request, 0.0)
        assert isinstance(submit, instructions.Submit)
        frame = shard_pb2.StepFrame(replica="demo-0", epoch=1)
        frame.accepted.add(request_id=name, attempt=submit.message.attempt, prompt_ids=[1])
        if ended:
            error = types_pb2.Error(reason=ended, message="x", retryable=False)
            frame.failed.add(request_id=name, attempt=submit.message.attempt, error=error)
        dispatcher.frame(UP, frame, 0.0)
    assert (dispatcher.counters.lost, dispatcher.counters.failed) == (1, 1)


def test_a_search_goes_on_without_a_replica_whose_stream_breaks() -> None:
    dispatcher, (first, _) = sought()
    assert dispatcher.stream_down(OTHER, "killed", 0.1) == []
    frame = shard_pb2.StepFrame(replica="demo-0", epoch=1)
    frame.failed.add(attempt=first.attempt, error=types_pb2.Error(reason="UNKNOWN_REQUEST"))
    assert dispatcher.frame(UP, frame, 0.2) == [instructions.NotHeld(KEY, certain=False)]
