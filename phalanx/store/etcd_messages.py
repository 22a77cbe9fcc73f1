"""Conversion between the store's values and etcd's messages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import grpc
from aetcd import rpc

from phalanx.store.interface import (
    Condition,
    Created,
    Entry,
    LeaseLostError,
    Operation,
    Put,
    StoreError,
    StoreUnavailableError,
)

# Invalid calls: a retry fails the same way.
_NOT_RETRYABLE = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


def to_key(kv: Any) -> str:
    """The key as text. Bytes that are not UTF-8 are escaped: a foreign key must not end a listing."""
    return str(kv.key.decode(errors="backslashreplace"))


def to_entry(kv: Any) -> Entry:
    """The entry in etcd's KeyValue."""
    return Entry(kv.value, kv.create_revision, kv.mod_revision)


def to_changes(response: Any, after: int) -> tuple[Mapping[str, Entry | None], int]:
    """The changes in a watch response after revision `after`, and the revision of the last one.

    The header's revision is no substitute: it may be newer than events that are still to come.
    """
    changed: dict[str, Entry | None] = {}
    revision = after
    for event in response.events:
        if event.kv.mod_revision > after:
            deleted = event.type == event.DELETE
            changed[to_key(event.kv)] = None if deleted else to_entry(event.kv)
            revision = max(revision, event.kv.mod_revision)
    return MappingProxyType(changed), revision


def from_condition(condition: Condition) -> Any:
    """A condition as etcd's Compare."""
    key = condition.key.encode()
    if isinstance(condition, Created):
        return rpc.Compare(
            key=key, result=rpc.Compare.EQUAL, target=rpc.Compare.CREATE, create_revision=condition.revision
        )
    return rpc.Compare(
        key=key, result=rpc.Compare.EQUAL, target=rpc.Compare.MOD, mod_revision=condition.revision
    )


def from_operation(operation: Operation) -> Any:
    """An operation as etcd's RequestOp."""
    key = operation.key.encode()
    if isinstance(operation, Put):
        put = rpc.PutRequest(key=key, value=operation.value, lease=operation.lease or 0)
        return rpc.RequestOp(request_put=put)
    return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))


def to_error(error: grpc.aio.AioRpcError | asyncio.InvalidStateError) -> StoreError:
    """The store error for a failed call."""
    if isinstance(error, asyncio.InvalidStateError):
        return StoreUnavailableError(
            f"etcd: {error}"
        )  # grpc.aio raises it for a write after the connection broke
    message = f"etcd: {error.details() or error.code().name}"
    if error.code() is grpc.StatusCode.NOT_FOUND and "lease" in message:
        return LeaseLostError(message)
    return StoreError(message) if error.code() in _NOT_RETRYABLE else StoreUnavailableError(message)
