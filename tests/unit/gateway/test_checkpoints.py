from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest

from dataplane.gateway import checkpoints
from dataplane.gateway.checkpoint_plan import (
    AFTER_S,
    EVERY_S,
    EVERY_TOKENS,
    Candidate,
    CheckpointPlan,
    Part,
    restore,
)
from dataplane.gateway.checkpoints import Checkpoints
from dataplane.gateway.journal import Journal
from phalanx.internal.v1 import shard_pb2
from phalanx.store.interface import Condition, Delete, Operation, StoreUnavailableError
from phalanx.store.keys import Keys
from phalanx.store.memory import MemoryStore
from phalanx.v1 import types_pb2
from tests.until import until

LEADER = shard_pb2.LeaderHello(model_hash="m", max_model_len=4096, eos_token_ids=[2])
KEY = "k" * 32


def begun(max_tokens: int = 1000, key: str = KEY) -> Journal:
    stopping = types_pb2.Stopping(max_tokens=max_tokens)
    template = shard_pb2.Submit(request_id=f"r-{key}", n=1, text="x", stopping=stopping, resume_key=key)
    journal = Journal("demo", template)
    journal.begin(1, "demo-0", LEADER)
    journal.accept([7, 8])
    return journal


def grow(journal: Journal, tokens: int, finish: types_pb2.FinishReason.ValueType = 0) -> None:  # type: ignore[assignment]
    start = journal.tokens
    ids = range(start, start + tokens)
    journal.append(
        shard_pb2.Delta(index=start, token_ids=ids, pieces=[str(i) for i in ids], finish_reason=finish)
    )


def due(plan: CheckpointPlan, journal: Journal, now: float, deadline: float | None = None) -> list[Part]:
    parts = plan.due([Candidate(journal, 0.0, deadline)], now, wall=1000.0)
    for part in parts:
        plan.written(part, now)
    return parts


def test_a_short_request_is_never_written() -> None:
    plan, journal = CheckpointPlan(), begun()
    grow(journal, 50)
    assert not due(plan, journal, AFTER_S - 0.1)
    grow(journal, 1, types_pb2.FINISH_REASON_LENGTH)
    assert not due(plan, journal, AFTER_S + 5)


def test_a_long_request_is_written_in_parts_by_tokens_and_by_time() -> None:
    plan, journal = CheckpointPlan(), begun()
    grow(journal, 5)
    (first,) = due(plan, journal, AFTER_S)
    assert (first.number, list(first.record.deltas[0].token_ids)) == (0, [0, 1, 2, 3, 4])
    assert list(first.record.request.token_ids.ids) == [7, 8]
    grow(journal, EVERY_TOKENS - 1)
    assert not due(plan, journal, AFTER_S + 0.1)
    grow(journal, 1)
    (second,) = due(plan, journal, AFTER_S + 0.1)
    assert (second.number, second.record.deltas[0].index) == (1, 5)
    assert not second.record.HasField("request")
    grow(journal, 1)
    assert not due(plan, journal, AFTER_S + 0.2)
    (third,) = due(plan, journal, AFTER_S + 0.1 + EVERY_S)
    assert third.number == 2
    assert not due(plan, journal, AFTER_S + 99), "nothing is new"
    assert plan.forget(KEY) == 3
    assert plan.forget(KEY) == 0


def test_a_part_whose_fate_is_unknown_is_written_again_with_what_came_since() -> None:
    plan, journal = CheckpointPlan(), begun()
    grow(journal, 5)
    (first,) = plan.due([Candidate(journal, 0.0)], AFTER_S, 0.0)
    grow(journal, 5)
    (again,) = plan.due([Candidate(journal, 0.0)], AFTER_S, 0.0)
    assert (first.number, again.number) == (0, 0)
    assert len(again.record.deltas[0].token_ids) == 10


def test_a_request_comes_back_from_its_parts() -> None:
    plan, journal, parts = CheckpointPlan(), begun(), []
    for round in range(4):
        grow(journal, EVERY_TOKENS)
        parts += due(plan, journal, AFTER_S + round, deadline=60.0)
    grow(journal, 7)  # lost with the gateway
    restored = restore([part.record for part in parts], wall=1010.0)
    assert restored is not None
    assert restored.journal.choices[0].token_ids == list(range(4 * EVERY_TOKENS))
    assert restored.journal.length == journal.length
    assert restored.timeout_s == pytest.approx(60.0 - AFTER_S - 10.0)


def test_a_part_that_is_missing_ends_what_can_be_used() -> None:
    plan, journal, parts = CheckpointPlan(), begun(), []
    for round in range(3):
        grow(journal, EVERY_TOKENS)
        parts += due(plan, journal, AFTER_S + round)
    restored = restore([parts[0].record, parts[2].record], wall=1000.0)
    assert restored is not None
    assert restored.journal.tokens == EVERY_TOKENS
    assert restore([parts[1].record], wall=1000.0) is None
    assert restore([], wall=1000.0) is None


async def test_checkpoints_are_written_together_found_by_anyone_and_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "_TICK_S", 0.001)
    store, keys = MemoryStore(), Keys("test")
    journals = [begun(key=f"{number:032x}") for number in range(100)]
    live = list(journals)
    writer = Checkpoints(store, keys, "boot", lambda: [Candidate(journal, -AFTER_S) for journal in live])
    running = asyncio.create_task(writer.run())
    reader = Checkpoints(store, keys, "another", list)
    for journal in journals:
        grow(journal, 3)
    await until(lambda: all(plan_has(writer, journal) for journal in journals))
    restored = await reader.load(journals[42].resume_key)
    assert restored is not None
    assert restored.journal.choices == journals[42].choices
    for journal in journals:
        live.remove(journal)
        writer.forget(journal.resume_key)
    async with asyncio.timeout(5):
        while (await store.list("/phalanx.requests/")).entries:
            await asyncio.sleep(0.001)
    assert await reader.load(journals[42].resume_key) is None
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


def plan_has(writer: Checkpoints, journal: Journal) -> bool:
    return journal.resume_key in writer._plan._written


async def test_a_request_that_is_too_large_for_the_store_is_in_nobodys_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "_TICK_S", 0.001)
    monkeypatch.setattr(checkpoints, "MAX_PART_BYTES", 400)
    store, large, small = MemoryStore(), begun(key="a" * 32), begun(key="b" * 32)
    grow(large, 300)
    grow(small, 3)
    candidates = [Candidate(large, -AFTER_S), Candidate(small, -AFTER_S)]
    writer = Checkpoints(store, Keys("test"), "boot", lambda: candidates)
    running = asyncio.create_task(writer.run())
    await until(lambda: plan_has(writer, small))
    assert await writer.load("a" * 32) is None
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def test_a_lost_lease_means_that_all_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_TICK_S", 0.001)
    monkeypatch.setattr(checkpoints, "TTL_S", 1)
    store, keys, journal = MemoryStore(), Keys("test"), begun()
    grow(journal, 3)
    writer = Checkpoints(store, keys, "boot", lambda: [Candidate(journal, -AFTER_S)])
    running = asyncio.create_task(writer.run())
    await until(lambda: plan_has(writer, journal))
    assert writer._lease is not None
    lost = writer._lease
    await store.revoke(lost)
    assert not (await store.list("/phalanx.requests/")).entries
    await until(lambda: writer._lease not in (None, lost) and plan_has(writer, journal))
    assert await writer.load(KEY) is not None
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


class SlowStore(MemoryStore):
    """A store that carries out each transaction at once and answers it once `answer` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.answer, self.in_flight = asyncio.Event(), 0

    async def txn(self, when: Sequence[Condition], then: Sequence[Operation]) -> int | None:
        self.in_flight += 1
        revision = await super().txn(when, then)
        await self.answer.wait()
        self.in_flight -= 1
        return revision

    async def keys(self) -> list[str]:
        return sorted((await self.list("/phalanx.requests/")).entries)


@contextlib.asynccontextmanager
async def writing(writer: Checkpoints) -> AsyncIterator[None]:
    running = asyncio.create_task(writer.run())
    try:
        yield
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def test_a_request_that_ends_while_its_part_is_being_written_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "_TICK_S", 0.001)
    store, stays, ends = SlowStore(), begun(key="a" * 32), begun(key="b" * 32)
    live = [stays, ends]
    for journal in live:
        grow(journal, 3)
    writer = Checkpoints(store, Keys("test"), "boot", lambda: [Candidate(one, -AFTER_S) for one in live])
    async with writing(writer):
        await until(lambda: store.in_flight)
        assert len(await store.keys()) == 2
        live.remove(ends)
        writer.forget(ends.resume_key)
        store.answer.set()
        async with asyncio.timeout(5):
            while len(await store.keys()) > 1:
                await asyncio.sleep(0.001)
        assert await writer.load(ends.resume_key) is None
        assert await writer.load(stays.resume_key) is not None


async def test_a_request_that_comes_back_at_once_keeps_its_new_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "_TICK_S", 0.001)
    store, journal = MemoryStore(), begun()
    grow(journal, 3)
    writer = Checkpoints(store, Keys("test"), "boot", lambda: [Candidate(journal, -AFTER_S)])
    async with writing(writer):
        await until(lambda: plan_has(writer, journal))
        # It ends here and is resumed here between two rounds: the same keys are deleted and written.
        writer.forget(journal.resume_key)
        await until(lambda: plan_has(writer, journal) and not writer._to_delete)
        assert await writer.load(KEY) is not None


async def test_a_request_that_comes_back_while_its_part_is_being_written_has_a_whole_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "_TICK_S", 0.001)
    store, journal = SlowStore(), begun()
    grow(journal, 3)
    store.answer.set()
    writer = Checkpoints(store, Keys("test"), "boot", lambda: [Candidate(journal, -AFTER_S)])
    async with writing(writer):
        await until(lambda: plan_has(writer, journal))
        store.answer.clear()
        grow(journal, EVERY_TOKENS)
        await until(lambda: store.in_flight)
        writer.forget(journal.resume_key)  # it ends here, and is resumed here, with its second part in flight
        store.answer.set()
        await until(lambda: plan_has(writer, journal) and not writer._to_delete and not store.in_flight)
        restored = await writer.load(KEY)
        assert restored is not None
        assert restored.journal.choices == journal.choices


class RefusingStore(SlowStore):
    """A store that cannot be reached for the first transaction that deletes something."""

    refusals = 1

    async def txn(self, when: Sequence[Condition], then: Sequence[Operation]) -> int | None:
        if self.refusals and any(isinstance(operation, Delete) for operation in then):
            self.refusals -= 1
            raise StoreUnavailableError("the store does not answer")
        return await super().txn(when, then)


async def test_what_could_not_be_deleted_is_deleted_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_TICK_S", 0.001)
    store, journal = RefusingStore(), begun()
    grow(journal, 3)
    live = [journal]
    store.answer.set()
    writer = Checkpoints(store, Keys("test"), "boot", lambda: [Candidate(one, -AFTER_S) for one in live])
    async with writing(writer):
        await until(lambda: plan_has(writer, journal))
        live.clear()
        writer.forget(journal.resume_key)
        async with asyncio.timeout(5):
            while await store.keys():
                await asyncio.sleep(0.001)
        assert store.refusals == 0
