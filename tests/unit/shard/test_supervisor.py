from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.shard.events import (
    AskPeerToStart,
    BeginServing,
    ControllerTimedOut,
    EndServing,
    Event,
    Exited,
    Hung,
    Instruction,
    Kill,
    LeaderStartedLife,
    PeerFailed,
    Publish,
    RankAssigned,
    RankUnassigned,
    Received,
    RendezvousSeen,
    SendRendezvous,
    Spawned,
    SpawnEngine,
    SpawnText,
    Stop,
    Withdraw,
    WorkerPaused,
)
from dataplane.shard.supervisor import LIFE_BITS, MAX_REASON, ShardSupervisor
from engine.ipc.wire import EngineFailed, EngineReady, Rendezvous, StartText, TextReady
from phalanx.store.records import ShardRecord, ShardState, encode

READY = EngineReady("hash", 128, 1000, (0,))
LEADER = RankAssigned("d-0", 0, 10, "/m", tp=2, pp=1)


def supervisor() -> ShardSupervisor:
    return ShardSupervisor("worker-0", "boot", "127.0.0.1", "cpu")


def feed(core: ShardSupervisor, *events: Event) -> list[Instruction]:
    todo = [instruction for event in events for instruction in core.handle(event)]
    core.check_integrity()
    return todo


def published(todo: list[Instruction]) -> list[ShardRecord]:
    return [instruction.record for instruction in todo if isinstance(instruction, Publish)]


def serving_leader() -> ShardSupervisor:
    core = supervisor()
    feed(core, LEADER, Spawned(1, 101), Spawned(2, 102), Received(1, READY), Received(2, TextReady()))
    return core


def test_a_leader_starts_both_children_and_says_so() -> None:
    text, engine, publish = feed(supervisor(), LEADER)
    assert isinstance(engine, SpawnEngine)
    assert (engine.child, engine.text) == (1, 2)
    assert (engine.start.config.rank, engine.start.config.epoch, engine.start.config.host) == (
        0,
        10 << LIFE_BITS,
        "127.0.0.1",
    )
    assert isinstance(text, SpawnText)
    assert isinstance(publish, Publish)
    assert (publish.record.state, publish.record.epoch) == (ShardState.STARTING, 10)


def test_children_hear_how_the_model_is_loaded() -> None:
    text, engine, _ = feed(supervisor(), replace(LEADER, load_format="dummy", quantization="int8"))
    assert isinstance(engine, SpawnEngine)
    assert (engine.start.config.load_format, engine.start.config.quantization) == ("dummy", "int8")
    assert isinstance(text, SpawnText)
    assert text.start == StartText("/m", ids_only=True)
    text, engine, _ = feed(supervisor(), LEADER)
    assert isinstance(engine, SpawnEngine)
    assert (engine.start.config.load_format, engine.start.config.quantization) == ("auto", "")
    assert isinstance(text, SpawnText)
    assert text.start == StartText("/m")


def test_another_rank_starts_no_text_process_and_is_ready_without_one() -> None:
    core = supervisor()
    todo = feed(core, RankAssigned("d-0", 1, 10, "/m", tp=2, pp=1), Spawned(1, 101), Received(1, READY))
    assert not any(isinstance(instruction, SpawnText | BeginServing) for instruction in todo)
    assert published(todo)[-1].state is ShardState.READY


def test_a_leader_serves_only_when_engine_and_text_are_ready() -> None:
    core = supervisor()
    assert not published(feed(core, LEADER, Received(1, READY)))[1:]
    begin, publish = feed(core, Received(2, TextReady(longest_token_bytes=16)))
    assert begin == BeginServing("d-0", 10, engine=1, text=2, ready=READY, longest_token_bytes=16)
    assert isinstance(publish, Publish)
    assert (publish.record.state, publish.record.model_hash) == (ShardState.READY, "hash")


def test_a_reason_is_short_and_printable_however_a_child_said_it() -> None:
    failed = EngineFailed("INVALID_MODEL", "\udcff" + "x" * 5000, permanent=True)
    record = published(feed(serving_leader(), Received(1, failed)))[-1]
    assert record.reason.startswith("INVALID_MODEL: ?x")
    assert len(record.reason) == MAX_REASON
    assert encode(record)


def test_a_leader_forms_anew_what_nobody_else_does() -> None:
    core, members = supervisor(), ("h:1", "h:2", "h:3")
    feed(core, replace(LEADER, addresses=members), Received(1, READY), Received(2, TextReady()))
    feed(core, Exited(1, "was killed by SIGKILL"))
    spawn, publish = feed(core, ControllerTimedOut(10, 0))
    assert isinstance(spawn, SpawnEngine)
    assert spawn.start.config.epoch == (10 << LIFE_BITS) + 1
    assert isinstance(publish, Publish)
    assert (publish.record.state, publish.record.life) == (ShardState.STARTING, 1)
    asked = [
        todo
        for todo in feed(core, Received(spawn.child, Rendezvous("h:9")))
        if isinstance(todo, AskPeerToStart)
    ]
    assert asked == [
        AskPeerToStart(address, rank, "d-0", 10, 1, "h:9")
        for rank, address in enumerate(members[1:], start=1)
    ]
    assert feed(core, ControllerTimedOut(10, 0)) == [], "once is enough"


def test_what_a_controller_has_formed_meanwhile_stays() -> None:
    core = serving_leader()
    feed(core, Exited(1, "was killed by SIGKILL"), replace(LEADER, epoch=11))
    assert feed(core, ControllerTimedOut(10, 0)) == []


def test_what_would_fail_again_is_left_to_the_controller() -> None:
    core = serving_leader()
    feed(core, Received(1, EngineFailed("INVALID_MODEL", "no weights", permanent=True)))
    assert feed(core, ControllerTimedOut(10, 0)) == []


def test_a_member_follows_its_leader_into_the_next_life() -> None:
    core = supervisor()
    feed(core, RankAssigned("d-0", 1, 10, "/m", tp=2, pp=1), Received(1, READY))
    todo = feed(core, LeaderStartedLife("d-0", 10, 1, "h:9"))
    assert Kill(1) in todo
    (spawn,) = (item for item in todo if isinstance(item, SpawnEngine))
    assert spawn.start.config.epoch == (10 << LIFE_BITS) + 1
    assert SendRendezvous(spawn.child, "h:9") in todo
    assert feed(core, LeaderStartedLife("d-0", 10, 1, "h:9")) == [], "asked again"
    assert feed(core, LeaderStartedLife("d-0", 9, 5, "h:9")) == [], "of another epoch"
    assert feed(core, LeaderStartedLife("e-0", 10, 5, "h:9")) == [], "of another replica"
    assert feed(core, PeerFailed(10, 0, "killed", permanent=False, life=0)) == [], "of the life before"


def test_the_rendezvous_goes_from_the_leaders_engine_to_the_store() -> None:
    core = supervisor()
    todo = feed(core, LEADER, Received(1, Rendezvous("127.0.0.1:9")), RendezvousSeen(10, "127.0.0.1:9"))
    assert published(todo)[-1].rendezvous == "127.0.0.1:9"
    assert not any(isinstance(instruction, SendRendezvous) for instruction in todo)


def test_the_rendezvous_goes_from_the_store_to_the_other_engines_once() -> None:
    core = supervisor()
    feed(core, RankAssigned("d-0", 1, 10, "/m", tp=2, pp=1))
    seen = RendezvousSeen(10, "127.0.0.1:9")
    assert feed(core, RendezvousSeen(9, "old"), seen, seen) == [SendRendezvous(1, "127.0.0.1:9")]


def test_the_death_of_the_engine_ends_serving_before_it_is_published() -> None:
    end, publish = feed(serving_leader(), Exited(1, "was killed by SIGKILL"))
    assert end == EndServing(10, "the engine was killed by SIGKILL")
    assert isinstance(publish, Publish)
    assert publish.record.state is ShardState.FAILED
    assert (publish.record.engine_pid, publish.record.text_pid) == (0, 102)


def test_the_death_of_the_text_process_ends_the_epoch_and_the_engine() -> None:
    end, kill, publish = feed(serving_leader(), Exited(2, "exited with code 1"))
    assert isinstance(end, EndServing)
    assert kill == Kill(1)
    assert isinstance(publish, Publish)
    assert publish.record.reason == "the text process exited with code 1"


def test_an_engine_that_hangs_is_killed_and_said_to() -> None:
    end, kill, publish = feed(serving_leader(), Hung(1, "hangs: no step"))
    assert isinstance(end, EndServing)
    assert kill == Kill(1)
    assert isinstance(publish, Publish)
    assert publish.record.reason == "the engine hangs: no step"


def test_a_hang_of_an_engine_of_the_past_means_nothing() -> None:
    core = serving_leader()
    feed(core, replace(LEADER, epoch=11))
    assert feed(core, Hung(1, "hangs")) == []


def test_a_worker_that_stood_still_gives_its_epoch_up() -> None:
    end, kill, publish = feed(serving_leader(), WorkerPaused(4.2))
    assert end == EndServing(10, "the worker was paused for 4.2 s")
    assert kill == Kill(1)
    assert isinstance(publish, Publish)
    assert publish.record.state is ShardState.FAILED
    assert feed(supervisor(), WorkerPaused(4.2)) == []


def test_the_first_failure_of_an_epoch_is_kept() -> None:
    core = serving_leader()
    feed(core, Received(1, EngineFailed("OUT_OF_MEMORY", "no room", permanent=True)))
    later = feed(core, Exited(1, "exited with code 1"), PeerFailed(10, 1, "broken", permanent=False))
    assert not later
    assert core.record is not None
    assert (core.record.reason, core.record.permanent) == ("OUT_OF_MEMORY: no room", True)


def test_the_last_words_of_the_text_process_are_a_failure_too() -> None:
    core = supervisor()
    feed(core, LEADER, Received(2, EngineFailed("INVALID_MODEL", "no tokeniser", permanent=True)))
    assert core.record is not None
    assert (core.record.state, core.record.permanent) == (ShardState.FAILED, True)


def test_the_failure_of_another_shard_ends_the_epoch_here() -> None:
    todo = feed(serving_leader(), PeerFailed(10, 1, "the engine was killed by SIGKILL", permanent=False))
    assert Kill(1) in todo
    assert published(todo)[-1].reason == "shard 1 failed: the engine was killed by SIGKILL"


def test_a_new_epoch_replaces_the_engine_and_keeps_the_text_process() -> None:
    core = serving_leader()
    todo = feed(core, RankAssigned("d-0", 0, 11, "/m", tp=2, pp=1))
    assert todo[:2] == [EndServing(10, "the replica is formed anew"), Kill(1)]
    assert isinstance(todo[2], SpawnEngine)
    assert todo[2].text == 2
    assert not any(isinstance(instruction, SpawnText) for instruction in todo)
    assert published(todo)[0].text_pid == 102
    assert BeginServing("d-0", 11, engine=3, text=2, ready=READY) in feed(core, Received(3, READY))


def test_another_model_or_rank_ends_the_text_process() -> None:
    for place in (
        RankAssigned("d-0", 0, 11, "/other", tp=2, pp=1),
        RankAssigned("d-0", 1, 11, "/m", tp=2, pp=1),
    ):
        assert Kill(2) in feed(serving_leader(), place)


def test_a_text_process_that_died_is_replaced_in_the_next_epoch() -> None:
    core = serving_leader()
    feed(core, Exited(2, "exited with code 1"))
    todo = feed(core, RankAssigned("d-0", 0, 11, "/m", tp=2, pp=1))
    assert [type(instruction) for instruction in todo] == [SpawnText, SpawnEngine, Publish]


def test_a_lost_place_leaves_nothing() -> None:
    core = serving_leader()
    todo = feed(core, RankUnassigned())
    assert todo == [EndServing(10, "the replica is gone"), Kill(1), Kill(2), Withdraw()]
    assert core.record is None


def test_a_move_to_another_replica_withdraws_the_old_status() -> None:
    todo = feed(serving_leader(), RankAssigned("d-1", 0, 7, "/m", tp=2, pp=1))
    assert Withdraw() in todo
    assert published(todo)[-1].replica == "d-1"


def test_nothing_happens_after_stop() -> None:
    core = serving_leader()
    todo = feed(
        core, Stop(), Exited(1, "was killed by SIGKILL"), RankAssigned("d-0", 0, 12, "/m", tp=2, pp=1)
    )
    assert todo == [EndServing(10, "the worker is shutting down"), Kill(1), Kill(2)]


class World(RuleBasedStateMachine):
    """Children that live, speak and die in any order, under a controller that does as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.core = supervisor()
        self.epoch = 1
        self.place: RankAssigned | None = None
        self.kinds: dict[int, str] = {}
        self.models: dict[int, str] = {}
        self.running: set[int] = set()  # spawned, not yet exited
        self.killed: set[int] = set()
        self.ready: set[int] = set()
        self.serving: int | None = None
        self.status: ShardRecord | None = None
        self.stopped = False
        self.engine_epoch = 0

    def feed(self, event: Event) -> None:
        for instruction in self.core.handle(event):
            self.do(instruction)

    def do(self, instruction: Instruction) -> None:
        match instruction:
            case SpawnEngine(child, start, text):
                assert {text} - {None} == (self.current("text") if start.config.rank == 0 else set())
                assert not self.current("engine"), "a second engine"
                assert self.place is not None
                epoch = start.config.epoch
                assert epoch > self.engine_epoch, "an engine of a life that is over"
                self.engine_epoch = epoch
                assert epoch >> LIFE_BITS == self.place.epoch
                self.spawn(child, "engine")
            case SpawnText(child, start):
                self.models[child] = start.model
                assert not self.current("text"), "a second text process"
                self.spawn(child, "text")
            case Kill(child):
                assert child not in self.killed, "killed twice"
                self.killed.add(child)
            case SendRendezvous(child):
                assert child in self.current("engine")
            case Publish(record):
                self.published(record)
            case Withdraw():
                self.status = None
            case BeginServing(_, epoch, engine, text):
                assert self.serving is None
                assert {engine, text} <= self.ready & self.current()
                assert self.place is not None
                assert self.models[text] == self.place.model
                self.serving = epoch
            case EndServing(epoch):
                assert self.serving == epoch
                self.serving = None

    def spawn(self, child: int, kind: str) -> None:
        assert not self.stopped
        assert child not in self.kinds, "a child's number was used again"
        self.kinds[child] = kind
        self.running.add(child)

    def published(self, record: ShardRecord) -> None:
        assert self.place is not None
        assert (record.replica, record.rank, record.epoch) == (
            self.place.replica,
            self.place.rank,
            self.place.epoch,
        )
        if self.status is not None and (self.status.epoch, self.status.life) == (record.epoch, record.life):
            assert self.status.state is not ShardState.FAILED or (
                (record.state, record.reason) == (ShardState.FAILED, self.status.reason)
            ), "the first failure is kept"
        if record.state is ShardState.READY:
            assert self.current("engine") & self.ready
            assert record.rank != 0 or self.current("text") & self.ready
        self.status = record

    def current(self, kind: str | None = None) -> set[int]:
        return {child for child in self.running - self.killed if kind in (None, self.kinds[child])}

    @rule(replica=st.sampled_from(["a", "b"]), rank=st.integers(0, 1), model=st.sampled_from(["/m", "/n"]))
    def assign(self, replica: str, rank: int, model: str) -> None:
        self.epoch += 1
        if not self.stopped:
            self.place = RankAssigned(replica, rank, self.epoch, model, tp=2, pp=1)
        self.feed(RankAssigned(replica, rank, self.epoch, model, tp=2, pp=1))

    @precondition(lambda self: self.place is not None)
    @rule()
    def assign_again(self) -> None:
        assert self.place is not None
        assert self.core.handle(self.place) == []

    @rule()
    def unassign(self) -> None:
        self.place = None
        self.feed(RankUnassigned())

    @property
    def life(self) -> int:
        return 0 if self.status is None else self.status.life

    @rule(age=st.integers(0, 2), older=st.integers(0, 1))
    def rendezvous(self, age: int, older: int) -> None:
        self.feed(RendezvousSeen(self.epoch - age, "127.0.0.1:1", self.life - older))

    @rule(age=st.integers(0, 2), older=st.integers(0, 1))
    def peer_failed(self, age: int, older: int) -> None:
        self.feed(PeerFailed(self.epoch - age, 1, "broken", permanent=False, life=self.life - older))

    @rule(older=st.integers(0, 1))
    def abandoned(self, older: int) -> None:
        self.feed(ControllerTimedOut(self.epoch, self.life - older))

    @precondition(lambda self: self.place is not None)
    @rule(newer=st.integers(-1, 2))
    def formed(self, newer: int) -> None:
        assert self.place is not None
        life = max(0, self.life + newer)
        self.feed(LeaderStartedLife(self.place.replica, self.epoch, life, "127.0.0.1:1"))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def spawned(self, data: st.DataObject) -> None:
        child = data.draw(st.sampled_from(sorted(self.running)))
        self.feed(Spawned(child, 1000 + child))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def speak(self, data: st.DataObject) -> None:
        child = data.draw(st.sampled_from(sorted(self.running)))
        failed = EngineFailed("X", "y", permanent=True)
        said = {"text": [TextReady(), failed], "engine": [READY, Rendezvous("127.0.0.1:1"), failed]}
        message = data.draw(st.sampled_from(said[self.kinds[child]]))
        if isinstance(message, EngineReady | TextReady):
            self.ready.add(child)
        self.feed(Received(child, message))

    @rule(text_first=st.booleans())
    def everybody_gets_ready(self, text_first: bool) -> None:
        for child in sorted(self.current(), reverse=text_first):
            self.ready.add(child)
            self.feed(Received(child, READY if self.kinds[child] == "engine" else TextReady()))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def exit(self, data: st.DataObject) -> None:
        child = data.draw(st.sampled_from(sorted(self.running)))
        self.running.discard(child)
        self.feed(Exited(child, "exited with code 1"))

    @precondition(lambda self: not self.stopped and self.epoch > 4)
    @rule()
    def stop(self) -> None:
        self.feed(Stop())
        self.stopped, self.place, self.status = True, None, None

    @invariant()
    def every_child_is_current_or_killed(self) -> None:
        wanted = set() if self.place is None else {"engine", "text"} if self.place.rank == 0 else {"engine"}
        assert {self.kinds[child] for child in self.current()} <= wanted
        assert len(self.current("engine")) <= 1
        assert len(self.current("text")) <= 1

    @invariant()
    def the_status_tells_the_truth(self) -> None:
        assert (self.status is None) == (self.place is None)
        if self.status is None or self.status.state is ShardState.FAILED:
            assert not self.current("engine")
            assert self.serving is None
        elif self.status.state is ShardState.READY:
            assert self.current("engine") & self.ready
            assert (self.serving == self.status.epoch) == (self.status.rank == 0)
        else:
            assert self.current("engine"), "a shard that is starting has an engine"
            assert self.serving is None

    @invariant()
    def the_core_is_whole(self) -> None:
        self.core.check_integrity()


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
