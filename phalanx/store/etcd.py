"""The store in etcd, by the generated stubs of aetcd.

aetcd's own client speaks to one host, and its watcher shares one stream among all watches and ends
them together; here every call may go to any endpoint and every watch has its own stream.
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

from phalanx.store.interface import (
    Change,
    Condition,
    Created,
    Entry,
    LeaseLostError,
    Listing,
    Operation,
    Put,
    StoreError,
    StoreUnavailableError,
    back_off,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),  # a listing is one message
    # etcd cuts clients that ping oftener than every 5 s, or without a call.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
# A member cut off from the quorum then ends a watch instead of staying silent (clientv3.WithRequireLeader).
_REQUIRE_LEADER = (("hasleader", "true"),)
# Misuse, which another try will not mend.
_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


class _StaleError(Exception):
    """The watch cannot go on from the revision that it has reached: list again."""


class EtcdStore:
    """A `Store` in etcd.

    Owns: one channel per endpoint and which of them is in use.
    Does not own: retries of writes (the caller knows whether a second try is safe), authentication.

    Reads and lease calls are tried once on each endpoint. A transaction is tried on one, since it may
    have happened although its answer was lost; the next call then goes to the next endpoint.
    """

    def __init__(self, endpoints: Sequence[str], *, timeout_s: float = 2.0) -> None:
        """`endpoints` are host:port; each call waits at most `timeout_s` for one of them."""
        if not endpoints:
            raise ValueError("a store needs at least one etcd endpoint")
        self._channels = [grpc.aio.insecure_channel(endpoint, options=_OPTIONS) for endpoint in endpoints]
        self._current = 0
        self._timeout_s = timeout_s

    async def get(self, key: str) -> Entry | None:
        """See `Store.get`."""
        request = rpc.RangeRequest(key=key.encode())
        response = await self._in_turn(lambda: self._unary(rpc.KVStub, "Range", request))
        return _entry(response.kvs[0]) if response.kvs else None

    async def list(self, prefix: str) -> Listing:
        """See `Store.list`."""
        request = rpc.RangeRequest(key=prefix.encode(), range_end=prefix_range_end(prefix.encode()))
        response = await self._in_turn(lambda: self._unary(rpc.KVStub, "Range", request))
        entries = {_key(kv): _entry(kv) for kv in response.kvs}
        return Listing(response.header.revision, MappingProxyType(entries))

    async def txn(self, when: Sequence[Condition], then: Sequence[Operation]) -> int | None:
        """See `Store.txn`."""
        request = rpc.TxnRequest(compare=map(_compare, when), success=map(_operation, then))
        response = await self._unary(rpc.KVStub, "Txn", request)
        return int(response.header.revision) if response.succeeded else None

    async def grant(self, ttl_s: int) -> int:
        """See `Store.grant`. etcd may make the time longer than asked, by default at least 2 s."""
        request = rpc.LeaseGrantRequest(TTL=ttl_s)
        response = await self._in_turn(lambda: self._unary(rpc.LeaseStub, "LeaseGrant", request))
        return int(response.ID)

    async def refresh(self, lease: int) -> float:
        """See `Store.refresh`."""
        return await self._in_turn(lambda: self._keep_alive(lease))

    async def revoke(self, lease: int) -> None:
        """See `Store.revoke`."""
        request = rpc.LeaseRevokeRequest(ID=lease)
        with contextlib.suppress(LeaseLostError):
            await self._in_turn(lambda: self._unary(rpc.LeaseStub, "LeaseRevoke", request))

    async def close(self) -> None:
        """See `Store.close`. End every watch before."""
        for channel in self._channels:
            await channel.close(grace=None)

    async def watch(self, prefix: str) -> AsyncGenerator[Change, None]:
        """See `Store.watch`. One change per response of etcd, which never splits a transaction."""
        listing: Listing | None = None
        stale, failures = True, 0
        while True:
            try:
                if stale:
                    before, listing = listing, await self.list(prefix)
                    changed = difference(before.entries if before else {}, listing.entries)
                    stale, failures = False, 0
                    if changed or before is None:
                        yield Change(listing, changed)
                assert listing is not None
                async with contextlib.aclosing(self._stream(prefix, listing.revision)) as responses:
                    async for response in responses:
                        failures = 0
                        changed, revision = _events(response, after=listing.revision)
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
        """Responses of one watch after `revision`, from its own stream; always raises in the end."""
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
                        # A member that lags, or another history: only a linearizable read can tell.
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
                raise StoreUnavailableError("etcd ended the stream that keeps a lease")
            finally:
                call.cancel()

    async def _unary(self, stub: Any, method: str, request: Any) -> Any:
        with self._endpoint() as channel:
            return await getattr(stub(channel), method)(request, timeout=self._timeout_s)

    async def _in_turn(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Try once on each endpoint: for calls that may happen twice."""
        for _ in self._channels[1:]:
            with contextlib.suppress(StoreUnavailableError):
                return await attempt()
        return await attempt()

    @contextlib.contextmanager
    def _endpoint(self) -> Iterator[grpc.aio.Channel]:
        """The endpoint in use. Its failures become store errors, and the next call uses the next one."""
        channel = self._channels[self._current]
        try:
            yield channel
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, StoreUnavailableError) as error:
            failure = _mapped(error)
            if isinstance(failure, StoreUnavailableError):
                self._rotate(channel)
            if failure is error:
                raise
            raise failure from error

    def _rotate(self, failed: grpc.aio.Channel) -> None:
        """Use the next endpoint, unless somebody has already turned away from the failed one."""
        if self._channels[self._current] is failed:
            self._current = (self._current + 1) % len(self._channels)


def difference(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> Mapping[str, Entry | None]:
    """What turns one listing's entries into another's; `None` marks a deleted key."""
    changed: dict[str, Entry | None] = {
        key: entry for key, entry in after.items() if before.get(key) != entry
    }
    changed |= dict.fromkeys(before.keys() - after.keys())
    return MappingProxyType(changed)


def _key(kv: Any) -> str:
    """The key as text. One that somebody wrote in other bytes than UTF-8 must not end a listing."""
    return str(kv.key.decode(errors="backslashreplace"))


def _events(response: Any, after: int) -> tuple[Mapping[str, Entry | None], int]:
    """What a response changed since revision `after`, and the revision that it leads to.

    That revision is the last event's: the header's may be of a later one whose events still follow.
    """
    changed: dict[str, Entry | None] = {}
    revision = after
    for event in response.events:
        if event.kv.mod_revision > after:
            deleted = event.type == event.DELETE
            changed[_key(event.kv)] = None if deleted else _entry(event.kv)
            revision = max(revision, event.kv.mod_revision)
    return MappingProxyType(changed), revision


def _applied(entries: Mapping[str, Entry], changed: Mapping[str, Entry | None]) -> Mapping[str, Entry]:
    merged = {**entries, **changed}
    return MappingProxyType({key: merged[key] for key in sorted(merged) if merged[key] is not None})  # type: ignore[misc]  # None was just left out


def _entry(kv: Any) -> Entry:
    return Entry(kv.value, kv.create_revision, kv.mod_revision)


def _compare(condition: Condition) -> Any:
    key = condition.key.encode()
    if isinstance(condition, Created):
        return rpc.Compare(
            key=key, result=rpc.Compare.EQUAL, target=rpc.Compare.CREATE, create_revision=condition.revision
        )
    return rpc.Compare(
        key=key, result=rpc.Compare.EQUAL, target=rpc.Compare.MOD, mod_revision=condition.revision
    )


def _operation(operation: Operation) -> Any:
    key = operation.key.encode()
    if isinstance(operation, Put):
        put = rpc.PutRequest(key=key, value=operation.value, lease=operation.lease or 0)
        return rpc.RequestOp(request_put=put)
    return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))


def _mapped(error: Exception) -> StoreError:
    if isinstance(error, StoreError):
        return error
    if not isinstance(error, grpc.aio.AioRpcError):
        return StoreUnavailableError(f"etcd: {error}")  # a call was written to after its connection broke
    message = f"etcd: {error.details() or error.code().name}"
    if error.code() is grpc.StatusCode.NOT_FOUND and "lease" in message:
        return LeaseLostError(message)
    return StoreError(message) if error.code() in _REFUSALS else StoreUnavailableError(message)
