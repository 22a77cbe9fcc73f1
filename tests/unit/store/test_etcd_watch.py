"""A watch at an etcd member that is behind the revision of the last listing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from aetcd import rpc

from phalanx.store.etcd import EtcdStore

REVISION = 10  # of the cluster; the member that lags is at 7


class Member:
    """An etcd member with one key. Its first watch stream says that the member lags, then stays silent."""

    def __init__(self) -> None:
        self.listings = 0
        self.watched_from: list[int] = []

    async def range(self, request: Any, context: Any) -> Any:
        self.listings += 1
        return rpc.RangeResponse(header={"revision": REVISION}, kvs=[_kv(b"1", REVISION)])

    async def watch(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        request = await anext(requests)
        self.watched_from.append(request.create_request.start_revision)
        lags = len(self.watched_from) == 1
        yield rpc.WatchResponse(created=True, header={"revision": REVISION - 3 * lags})
        if not lags:
            yield rpc.WatchResponse(
                header={"revision": REVISION + 1}, events=[{"kv": _kv(b"2", REVISION + 1)}]
            )
        await asyncio.Event().wait()


def _kv(value: bytes, revision: int) -> dict[str, Any]:
    return {"key": b"/a", "value": value, "create_revision": REVISION, "mod_revision": revision}


@pytest.fixture
async def member() -> AsyncIterator[tuple[Member, str]]:
    member, server = Member(), grpc.aio.server()
    kv = grpc.unary_unary_rpc_method_handler(
        member.range, rpc.RangeRequest.FromString, rpc.RangeResponse.SerializeToString
    )
    watch = grpc.stream_stream_rpc_method_handler(
        member.watch, rpc.WatchRequest.FromString, rpc.WatchResponse.SerializeToString
    )
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("etcdserverpb.KV", {"Range": kv}),
            grpc.method_handlers_generic_handler("etcdserverpb.Watch", {"Watch": watch}),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield member, f"127.0.0.1:{port}"
    await server.stop(None)


async def test_a_watch_lists_again_when_its_member_lags_and_yields_nothing_twice(
    member: tuple[Member, str],
) -> None:
    etcd, endpoint = member
    store = EtcdStore([endpoint])
    async with asyncio.timeout(10), aclosing(store.watch("/")) as changes:
        seen = [await anext(changes), await anext(changes)]
    await store.close()
    assert [change.listing.entries["/a"].value for change in seen] == [b"1", b"2"]
    assert etcd.listings == 2
    assert etcd.watched_from == [REVISION + 1, REVISION + 1]
