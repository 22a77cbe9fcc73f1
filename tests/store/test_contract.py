"""The contract of `Store`, for both implementations."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from phalanx.store.interface import (
    Created,
    Delete,
    Entry,
    LeaseLostError,
    Modified,
    Put,
    Store,
    StoreError,
    StoreUnavailableError,
)
from tests.store.conftest import until


async def put(store: Store, key: str, value: bytes, lease: int | None = None) -> int:
    revision = await store.txn([], [Put(key, value, lease)])
    assert revision is not None
    return revision


async def test_a_missing_key_has_no_entry(store: Store, root: str) -> None:
    assert await store.get(root + "none") is None


async def test_a_put_is_read_back_with_its_revisions(store: Store, root: str) -> None:
    created = await put(store, root + "a", b"\x00one")
    modified = await put(store, root + "a", b"two")
    assert modified > created
    assert await store.get(root + "a") == Entry(b"two", created, modified)


async def test_list_has_the_prefix_only_and_its_revision(store: Store, root: str) -> None:
    await put(store, root + "a/1", b"1")
    await put(store, root + "b", b"2")
    last = await put(store, root + "a/2", b"3")
    listing = await store.list(root + "a/")
    assert {key: entry.value for key, entry in listing.entries.items()} == {
        root + "a/1": b"1",
        root + "a/2": b"3",
    }
    assert listing.revision >= last


async def test_a_txn_applies_everything_at_one_revision(store: Store, root: str) -> None:
    await put(store, root + "old", b"")
    revision = await store.txn([], [Put(root + "a", b"1"), Put(root + "b", b"2"), Delete(root + "old")])
    entries = (await store.list(root)).entries
    assert {key: entry.mod_revision for key, entry in entries.items()} == {
        root + "a": revision,
        root + "b": revision,
    }


async def test_a_txn_whose_condition_fails_does_nothing(store: Store, root: str) -> None:
    created = await put(store, root + "a", b"1")
    when = [Created(root + "a", created), Modified(root + "b", created)]
    assert await store.txn(when, [Put(root + "a", b"2"), Put(root + "c", b"3")]) is None
    entries = (await store.list(root)).entries
    assert entries == {root + "a": Entry(b"1", created, created)}


async def test_created_zero_holds_only_while_the_key_is_missing(store: Store, root: str) -> None:
    key = root + "a"
    assert await store.txn([Created(key, 0)], [Put(key, b"1")]) is not None
    assert await store.txn([Created(key, 0)], [Put(key, b"2")]) is None
    await store.txn([], [Delete(key)])
    assert await store.txn([Modified(key, 0)], [Put(key, b"3")]) is not None


async def test_created_survives_a_write_and_modified_does_not(store: Store, root: str) -> None:
    key = root + "a"
    first = await put(store, key, b"1")
    await put(store, key, b"2")
    assert await store.txn([Modified(key, first)], [Put(key, b"3")]) is None
    assert await store.txn([Created(key, first)], [Put(key, b"4")]) is not None


async def test_a_recreated_key_has_a_new_create_revision(store: Store, root: str) -> None:
    first = await put(store, root + "a", b"1")
    await store.txn([], [Delete(root + "a")])
    second = await put(store, root + "a", b"1")
    assert await store.get(root + "a") == Entry(b"1", second, second)
    assert second > first


async def test_deleting_a_missing_key_changes_nothing(store: Store, root: str) -> None:
    before = await put(store, root + "a", b"1")
    assert await store.txn([], [Delete(root + "none")]) == before


async def test_a_txn_that_writes_a_key_twice_is_refused(store: Store, root: str) -> None:
    with pytest.raises(StoreError) as refusal:
        await store.txn([], [Put(root + "a", b"1"), Put(root + "a", b"2")])
    assert not isinstance(refusal.value, StoreUnavailableError)
    assert await store.get(root + "a") is None


async def test_an_expired_lease_deletes_its_keys(store: Store, root: str) -> None:
    lease = await store.grant(1)
    await put(store, root + "leased", b"1", lease)
    await put(store, root + "kept", b"2")
    async with aclosing(store.watch(root)) as changes:
        seen = await until(changes, lambda change: change.changed.get(root + "leased", change) is None)
    assert list(seen[-1].listing.entries) == [root + "kept"]


async def test_a_refreshed_lease_outlives_its_first_ttl(store: Store, root: str) -> None:
    """Two leases with the same time to live: the one that is refreshed ends later."""
    long, short = await store.grant(2), await store.grant(2)
    await put(store, root + "long", b"", long)
    await put(store, root + "short", b"", short)

    async def keep() -> None:
        while True:
            assert await store.refresh(long) > 0
            await asyncio.sleep(0.2)

    async with asyncio.TaskGroup() as tasks:
        keeper = tasks.create_task(keep())
        async with aclosing(store.watch(root)) as changes:
            seen = await until(changes, lambda change: None in change.changed.values())
        keeper.cancel()
    assert list(seen[-1].listing.entries) == [root + "long"]
    await store.revoke(long)


async def test_refresh_returns_the_time_to_live(store: Store) -> None:
    lease = await store.grant(7)
    assert await store.refresh(lease) == 7.0
    await store.revoke(lease)


async def test_revoking_a_lease_deletes_its_keys_at_once(store: Store, root: str) -> None:
    lease = await store.grant(60)
    await put(store, root + "a", b"1", lease)
    await store.revoke(lease)
    assert await store.get(root + "a") is None


async def test_a_lease_that_ended_is_lost_for_refresh_and_put_but_not_for_revoke(
    store: Store, root: str
) -> None:
    lease = await store.grant(60)
    await store.revoke(lease)
    with pytest.raises(LeaseLostError):
        await store.refresh(lease)
    with pytest.raises(LeaseLostError):
        await store.txn([], [Put(root + "a", b"1", lease)])
    await store.revoke(lease)
    assert await store.get(root + "a") is None


async def test_a_put_without_the_lease_detaches_the_key_from_it(store: Store, root: str) -> None:
    lease = await store.grant(60)
    await put(store, root + "a", b"1", lease)
    await put(store, root + "a", b"2")
    await store.revoke(lease)
    entry = await store.get(root + "a")
    assert entry is not None
    assert entry.value == b"2"


async def test_a_watch_begins_with_the_listing(store: Store, root: str) -> None:
    first = await put(store, root + "a", b"1")
    async with aclosing(store.watch(root)) as changes:
        change = await anext(changes)
    assert change.listing.entries == change.changed == {root + "a": Entry(b"1", first, first)}
    assert change.listing.revision >= first


async def test_a_watch_of_nothing_begins_with_an_empty_listing(store: Store, root: str) -> None:
    async with aclosing(store.watch(root)) as changes:
        assert (await anext(changes)).listing.entries == {}


async def test_a_watch_yields_each_write_as_it_comes(store: Store, root: str) -> None:
    async with aclosing(store.watch(root)) as changes:
        await anext(changes)
        for number in range(5):
            await put(store, f"{root[:-1]}-other/a", b"not ours")
            revision = await put(store, root + "a", b"%d" % number)
            assert (await anext(changes)).listing.revision == revision


async def test_a_slow_reader_misses_no_key_and_sees_none_twice(store: Store, root: str) -> None:
    """Several writes may come as one change."""
    async with aclosing(store.watch(root)) as changes:
        await anext(changes)
        revisions = [await put(store, f"{root}{number}", b"") for number in range(20)]
        seen = await until(changes, lambda change: f"{root}19" in change.changed)
    written = [entry.mod_revision for change in seen for entry in change.changed.values() if entry]
    assert written == revisions
    assert seen[-1].listing == await store.list(root)


async def test_a_watch_yields_a_txn_as_one_change(store: Store, root: str) -> None:
    await put(store, root + "a", b"1")
    async with aclosing(store.watch(root)) as changes:
        await anext(changes)
        revision = await store.txn([], [Delete(root + "a"), Put(root + "b", b"2"), Put(root + "c", b"3")])
        change = await anext(changes)
    assert revision is not None
    assert change.changed == {
        root + "a": None,
        root + "b": Entry(b"2", revision, revision),
        root + "c": Entry(b"3", revision, revision),
    }
    assert list(change.listing.entries) == [root + "b", root + "c"]


async def test_a_rewrite_with_the_same_value_is_a_change(store: Store, root: str) -> None:
    created = await put(store, root + "a", b"1")
    async with aclosing(store.watch(root)) as changes:
        await anext(changes)
        again = await put(store, root + "a", b"1")
        assert (await anext(changes)).changed == {root + "a": Entry(b"1", created, again)}


async def test_two_watchers_see_the_same_and_one_may_leave(store: Store, root: str) -> None:
    async with aclosing(store.watch(root)) as stays:
        await anext(stays)
        async with aclosing(store.watch(root)) as leaves:
            await anext(leaves)
            await put(store, root + "a", b"1")
            assert await anext(leaves) == await anext(stays)
        await put(store, root + "b", b"2")
        assert list((await anext(stays)).changed) == [root + "b"]


async def test_a_cancelled_watch_ends_its_reader(store: Store, root: str) -> None:
    listed = asyncio.Event()

    async def read() -> None:
        async for _ in store.watch(root):
            listed.set()

    reader = asyncio.create_task(read())
    await listed.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
