"""The store in etcd, through the generated gRPC stubs of aetcd.

aetcd's own client is not used: it speaks to one host, and its watches share one stream and end
together. Here each call may go to any endpoint, and each watch has its own stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import grpc
from aetcd import rpc
from aetcd.utils import prefix_range_end

from phalanx.store.backoff import back_off
from phalanx.store.etcd_messages import (
    from_condition,
    from_operation,
    to_changes,
    to_entry,
    to_error,
    to_key,
)
from phalanx.store.interface import (
    Change,
    Condition,
    Entry,
    LeaseLostError,
    Listing,
    Operation,
    StoreError,
    StoreUnavailableError,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),  # a listing is one message
    # etcd disconnects a client that pings more often than every 5 s, or without an open call.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
# Makes a member that loses the quorum end the watch instead of staying silent (clientv3.WithRequireLeader).
_REQUIRE_LEADER = (("hasleader", "true"),)


class _StaleError(Exception):
    """The watch cannot resume from its revision and must list again."""


class EtcdStore:
    """A `Store` in etcd.

    Owns: one channel per endpoint, and the choice of the endpoint in use.
    Does not own: retries of transactions (only the caller knows whether a retry is safe), authentication.

    Reads and lease calls are tried once on each endpoint. A transaction is tried once in all: it may
    have been applied although its response was lost. After a failure the next call uses the next endpoint.
    """

    def __init__(self, endpoints: Sequence[str], *, timeout_s: float = 2.0) -> None:
        """`endpoints` are host:port. A call to one endpoint times out after `timeout_s` seconds."""
        if not endpoints:
            raise ValueError("a store needs at least one etcd endpoint")
        self._channels = [grpc.aio.insecure_channel(endpoint, options=_OPTIONS) for endpoint in endpoints]
        self._current = 0
        self._timeout_s = timeout_s

    async def get(self, key: str) -> Entry | None:
        """See `Store.get`."""
        request = rpc.RangeRequest(key=key.encode())
        response = await self._on_each_endpoint(lambda: self._unary(rpc.KVStub, "Range", request))
        return to_entry(response.kvs[0]) if response.kvs else None

    async def list(self, prefix: str) -> Listing:
        """See `Store.list`."""
        request = rpc.RangeRequest(key=prefix.encode(), range_end=prefix_range_end(prefix.encode()))
        response = await self._on_each_endpoint(lambda: self._unary(rpc.KVStub, "Range", request))
        entries = {to_key(kv): to_entry(kv) for kv in response.kvs}
        return Listing(response.header.revision, MappingProxyType(entries))

    async def txn(self, when: Sequence[Condition], then: Sequence[Operation]) -> int | None:
        """See `Store.txn`."""
        request = rpc.TxnRequest(compare=map(from_condition, when), success=map(from_operation, then))
        response = await self._unary(rpc.KVStub, "Txn", request)
        return int(response.header.revision) if response.succeeded else None

    async def grant(self, ttl_s: int) -> int:
        """See `Store.grant`. etcd may grant a longer time to live: at least 2 s by default."""
        request = rpc.LeaseGrantRequest(TTL=ttl_s)
        response = await self._on_each_endpoint(lambda: self._unary(rpc.LeaseStub, "LeaseGrant", request))
        return int(response.ID)

    async def refresh(self, lease: int) -> float:
        """See `Store.refresh`."""
        return await self._on_each_endpoint(lambda: self._keep_alive(lease))

    async def revoke(self, lease: int) -> None:
        """See `Store.revoke`."""
        request = rpc.LeaseRevokeRequest(ID=lease)
        with contextlib.suppress(LeaseLostError):
            await self._on_each_endpoint(lambda: self._unary(rpc.LeaseStub, "LeaseRevoke", request))

    async def close(self) -> None:
        """See `Store.close`. Close every watch first."""
        for channel in self._channels:
            await channel.close(grace=None)

    async def watch(self, prefix: str) -> AsyncGenerator[Change, None]:
        """See `Store.watch`. Yields one change per response; etcd never splits a transaction."""
        listing: Listing | None = None
        stale, failures = True, 0
        while True:
            try:
                if stale:
                    before, listing = listing, await self.list(prefix)
                    changed = _difference(before.entries if before else {}, listing.entries)
                    stale, failures = False, 0
                    if changed or before is None:
                        yield Change(listing, changed)
                assert listing is not None
                async with contextlib.aclosing(self._stream(prefix, listing.revision)) as responses:
                    async for response in responses:
                        failures = 0
                        changed, revision = to_changes(response, after=listing.revision)
                        if changed:
                            listing = Listing(revision, _applied(listing.entries, changed))
                            yield Change(listing, changed)
            except _StaleError as error:
                stale, failures = True, failures + 1
                log.info("watch lists again", extra={"prefix": prefix, "reason": str(error)})
            except StoreUnavailableError as error:
                failures += 1
                log.warning("watch broke", extra={"prefix": prefix, "reason": str(error)})
            await asyncio.sleep(back_off(failures))

    async def _stream(self, prefix: str, revision: int) -> AsyncGenerator[Any, None]:
        """Responses of one watch after `revision`, on its own stream. Ends only by an exception."""
        create = rpc.WatchCreateRequest(
            key=prefix.encode(),
            range_end=prefix_range_end(prefix.encode()),
            start_revision=revision + 1,
        )
        with self._endpoint() as channel:
            call = rpc.WatchStub(channel).Watch(metadata=_REQUIRE_LEADER)
            try:
                await call.write(rpc.WatchRequest(create_request=create))
                async for response in call:
                    if response.compact_revision:
                        raise _StaleError(f"compacted at revision {response.compact_revision}")
                    if response.created and response.header.revision < revision:
                        # The member lags behind, or etcd was restored from a backup. After a restore,
                        # this watch would stay silent until etcd reaches `revision` again. A
                        # linearizable list is right in both cases.
                        raise _StaleError(f"etcd is at {response.header.revision}, the watch at {revision}")
                    if response.canceled:
                        raise StoreUnavailableError(f"etcd cancelled the watch: {response.cancel_reason}")
                    yield response
                raise StoreUnavailableError("etcd ended the watch stream")
            finally:
                call.cancel()

    async def _keep_alive(self, lease: int) -> float:
        with self._endpoint() as channel:
            call = rpc.LeaseStub(channel).LeaseKeepAlive(timeout=self._timeout_s)
            try:
                await call.write(rpc.LeaseKeepAliveRequest(ID=lease))
                async for response in call:
                    if response.TTL <= 0:
                        raise LeaseLostError(f"lease {lease:x} has ended")
                    return float(response.TTL)
                raise StoreUnavailableError("etcd ended the lease keep-alive stream")
            finally:
                call.cancel()

    async def _unary(self, stub: Any, method: str, request: Any) -> Any:
        with self._endpoint() as channel:
            return await getattr(stub(channel), method)(request, timeout=self._timeout_s)

    async def _on_each_endpoint(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try once on each endpoint until one succeeds. Only for calls that may be applied twice."""
        for _ in self._channels[1:]:
            with contextlib.suppress(StoreUnavailableError):
                return await attempt()
        return await attempt()

    @contextlib.contextmanager
    def _endpoint(self) -> Iterator[grpc.aio.Channel]:
        """The endpoint in use. Turns its failures into store errors; after one, the next endpoint is used."""
        channel = self._channels[self._current]
        try:
            yield channel
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, StoreUnavailableError) as error:
            failure = error if isinstance(error, StoreError) else to_error(error)
            if isinstance(failure, StoreUnavailableError):
                self._rotate(channel)
            if failure is error:
                raise
            raise failure from error

    def _rotate(self, failed: grpc.aio.Channel) -> None:
        """Use the next endpoint, unless a concurrent call has already left the failed one."""
        if self._channels[self._current] is failed:
            self._current = (self._current + 1) % len(self._channels)


def _difference(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> Mapping[str, Entry | None]:
    """The changes from the entries `before` to the entries `after`; `None` marks a deleted key."""
    changed: dict[str, Entry | None] = {
        key: entry for key, entry in after.items() if before.get(key) != entry
    }
    changed |= dict.fromkeys(before.keys() - after.keys())
    return MappingProxyType(changed)


def _applied(entries: Mapping[str, Entry], changed: Mapping[str, Entry | None]) -> Mapping[str, Entry]:
    merged = {**entries, **changed}
    return MappingProxyType({key: merged[key] for key in sorted(merged) if merged[key] is not None})  # type: ignore[misc]  # None is filtered out
