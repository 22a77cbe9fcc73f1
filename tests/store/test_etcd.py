"""The etcd store when etcd dies, compacts its history, or has several endpoints."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from aetcd import rpc

from phalanx.cli.local.embedded_etcd import Etcd, free_port, running, wait_until_healthy
from phalanx.store.etcd import EtcdStore
from phalanx.store.interface import Change, Created, Modified, Put, StoreUnavailableError
from tests.store.conftest import until


@pytest.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[Etcd]:
    """An etcd that the test may kill."""
    async with running(tmp_path / "etcd") as process:
        yield process


@pytest.fixture
async def store(etcd: Etcd) -> AsyncIterator[EtcdStore]:
    opened = EtcdStore([etcd.endpoint], timeout_s=1.0)
    yield opened
    await opened.close()


async def compact(endpoint: str, revision: int) -> None:
    async with grpc.aio.insecure_channel(endpoint) as channel:
        request = rpc.CompactionRequest(revision=revision, physical=True)
        await rpc.KVStub(channel).Compact(request, timeout=5)


async def put(store: EtcdStore, key: str, value: bytes) -> int:
    revision = await store.txn([], [Put(key, value)])
    assert revision is not None
    return revision


async def test_everything_is_unavailable_while_etcd_is_down(etcd: Etcd, store: EtcdStore) -> None:
    lease = await store.grant(60)
    etcd.kill()
    calls: list[Any] = [
        store.get("a"),
        store.list("a"),
        store.txn([], [Put("a", b"")]),
        store.grant(5),
        store.refresh(lease),
        store.revoke(lease),
    ]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailableError] * len(calls)


async def test_a_watch_resumes_after_etcd_was_killed_and_restarted(
    etcd: Etcd, store: EtcdStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Every write is seen once, also a write that was made while the watch was broken."""
    revisions = [await put(store, "/r/a", b"0")]
    async with aclosing(store.watch("/r/")) as changes:
        seen = [await anext(changes)]
        revisions.append(await put(store, "/r/a", b"1"))
        seen.append(await anext(changes))
        etcd.kill()
        waiting = asyncio.create_task(until(changes, lambda change: "/r/last" in change.changed))
        await etcd.restart()
        other = EtcdStore([etcd.endpoint])
        for number in range(2, 12):
            revisions.append(await put(other, "/r/a", b"%d" % number))
        revisions.append(await put(other, "/r/last", b""))
        await other.close()
        seen += await waiting
    written = [
        entry.mod_revision for change in seen for entry in change.changed.values() if entry is not None
    ]
    # One response may carry several writes of one key, of which a listing shows the last.
    assert written == sorted(set(written))
    assert set(written) <= set(revisions)
    assert [change.listing.revision for change in seen] == sorted({c.listing.revision for c in seen})
    assert {key: entry.value for key, entry in seen[-1].listing.entries.items()} == {
        "/r/a": b"11",
        "/r/last": b"",
    }
    assert "watch broke" in caplog.text
    assert "lists again" not in caplog.text


async def test_a_watch_lists_again_when_its_revision_was_compacted(
    etcd: Etcd, store: EtcdStore, caplog: pytest.LogCaptureFixture
) -> None:
    """The difference is yielded: rewritten, deleted, recreated and new keys; not the untouched one."""
    caplog.set_level("INFO")
    await store.txn([], [Put(f"/c/{name}", b"old") for name in ("kept", "rewritten", "deleted", "recreated")])
    async with aclosing(store.watch("/c/")) as changes:
        await anext(changes)
        etcd.kill()
        waiting = asyncio.create_task(until(changes, lambda change: True))
        other = await _restarted_and_compacted(etcd)
        (change,) = await waiting
        assert set(change.changed) == {"/c/rewritten", "/c/deleted", "/c/recreated", "/c/new"}
        assert change.changed["/c/deleted"] is None
        assert change.listing == await other.list("/c/")
        assert "lists again" in caplog.text
        revision = await put(other, "/c/after", b"")
        assert (await anext(changes)).listing.revision == revision
        await other.close()


async def test_a_watch_lists_again_when_etcd_has_another_history(
    etcd: Etcd, store: EtcdStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a restore from a backup, etcd is behind the watch and never sends the next revision."""
    caplog.set_level("INFO")
    await put(store, "/h/old", b"1")
    await put(store, "/h/old", b"2")
    async with aclosing(store.watch("/h/")) as changes:
        await anext(changes)
        etcd.kill()
        shutil.rmtree(tmp_path / "etcd")
        waiting = asyncio.create_task(until(changes, lambda change: True))
        await etcd.restart()
        (change,) = await waiting
        assert dict(change.changed) == {"/h/old": None}
        assert "lists again" in caplog.text
        revision = await put(store, "/h/new", b"")
        assert (await anext(changes)).listing.revision == revision


async def _restarted_and_compacted(etcd: Etcd) -> EtcdStore:
    """Rewrite and compact /c/ on another port, where the watch cannot see it; then return to the own port."""
    hidden_port = free_port()
    hidden = [argument.replace(etcd.endpoint, f"127.0.0.1:{hidden_port}") for argument in etcd.arguments]
    behind = Etcd(f"127.0.0.1:{hidden_port}", hidden, etcd.process)
    await behind.restart()
    store = EtcdStore([behind.endpoint])
    await store.txn([], [Put("/c/rewritten", b"new"), Put("/c/new", b"new")])
    for key in ("/c/deleted", "/c/recreated"):
        lease = await store.grant(60)
        await store.txn([], [Put(key, b"leased", lease)])
        await store.revoke(lease)
    await compact(behind.endpoint, await put(store, "/c/recreated", b"old"))
    await store.close()
    behind.kill()
    await etcd.restart()
    return EtcdStore([etcd.endpoint])


async def test_the_next_endpoint_answers_when_the_first_is_dead(etcd: Etcd) -> None:
    store = EtcdStore([f"127.0.0.1:{free_port()}", etcd.endpoint])
    lease = await store.grant(60)
    assert await store.refresh(lease) == 60.0
    assert await store.txn([Created("a", 0)], [Put("a", b"1", lease)]) is not None
    async with aclosing(store.watch("a")) as changes:
        assert list((await anext(changes)).changed) == ["a"]
    await store.close()


async def test_a_key_that_is_not_utf8_ends_neither_a_listing_nor_a_watch(
    etcd: Etcd, store: EtcdStore
) -> None:
    async with aclosing(store.watch("a/")) as changes:
        await anext(changes)
        async with grpc.aio.insecure_channel(etcd.endpoint) as channel:
            await rpc.KVStub(channel).Put(rpc.PutRequest(key=b"a/\xff", value=b"1"), timeout=5)
        seen = await until(changes, lambda change: bool(change.changed))
    assert list(seen[-1].changed) == ["a/\\xff"]
    assert list((await store.list("a/")).entries) == ["a/\\xff"]


async def test_a_txn_is_never_tried_twice(etcd: Etcd) -> None:
    """It may have been applied: only the caller can find out. The next call uses the next endpoint."""
    store = EtcdStore([f"127.0.0.1:{free_port()}", etcd.endpoint])
    with pytest.raises(StoreUnavailableError):
        await store.txn([Modified("a", 0)], [Put("a", b"1")])
    assert await store.txn([Modified("a", 0)], [Put("a", b"1")]) is not None
    await store.close()


async def test_leases_survive_a_restart_of_etcd(etcd: Etcd, store: EtcdStore) -> None:
    lease = await store.grant(60)
    await store.txn([], [Put("a", b"1", lease)])
    etcd.kill()
    await etcd.restart()
    assert await store.refresh(lease) == 60.0
    assert await store.get("a") is not None


async def test_a_watch_that_began_while_etcd_was_down_begins_when_it_is_back(
    etcd: Etcd, store: EtcdStore
) -> None:
    await put(store, "/w/a", b"1")
    etcd.kill()
    async with aclosing(store.watch("/w/")) as changes:
        waiting = asyncio.create_task(until(changes, lambda change: True))
        await etcd.restart()
        changed: list[Change] = await waiting
    assert list(changed[0].changed) == ["/w/a"]


async def test_nobody_there_is_not_healthy() -> None:
    with pytest.raises(StoreUnavailableError, match="not healthy within"):
        await wait_until_healthy(f"127.0.0.1:{free_port()}", 0.3)
