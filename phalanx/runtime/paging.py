"""Pages of a list, as https://google.aip.dev/158 describes them. Pure.

A page token contains the name of the last item of its page. So any process that serves the list can continue
it. A client that follows the tokens gets every item exactly once; an item that is added or removed meanwhile
may be missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol, TypeVar

from phalanx.runtime import opaque
from phalanx.runtime.errors import PhalanxError
from phalanx.runtime.filters import Fields

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
_VERSION = b"\x01"
_DIGEST_BYTES = 8

Item = TypeVar("Item")


class ListRequest(Protocol):
    """The fields that every list request of the public API has."""

    page_size: int
    page_token: str
    filter: str


def page(items: Mapping[str, Item], request: ListRequest, fields: Fields) -> tuple[list[Item], str]:
    """One page of `items` in the order of their names, and the token of the next page ("" on the last).

    Raises:
        PhalanxError: INVALID_ARGUMENT: the page size is negative, the filter is not one over `fields`, or
            the token is of another list or filter.
    """
    if request.page_size < 0:
        raise PhalanxError("INVALID_ARGUMENT", "page_size must not be negative", param="page_size")
    size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    wanted = fields.parse(request.filter)
    head = _VERSION + _digest(fields.collection, request.filter)
    after = _last_name(request.page_token, head) if request.page_token else None
    names = sorted(
        name for name, item in items.items() if (after is None or name > after) and wanted.matches(item)
    )
    more = len(names) > size
    token = opaque.encode(head + names[size - 1].encode()) if more else ""
    return [items[name] for name in names[:size]], token


def _digest(collection: str, filter: str) -> bytes:
    """Ties a token to the request that it continues. Not a secret: a token gives access to nothing."""
    return hashlib.blake2b(f"{collection}\0{filter}".encode(), digest_size=_DIGEST_BYTES).digest()


def _last_name(token: str, head: bytes) -> str:
    """The name in a page token that begins with `head`."""
    try:
        content = opaque.decode(token)
        if content.startswith(head):
            return content.removeprefix(head).decode()
    except ValueError:
        pass
    raise PhalanxError(
        "INVALID_ARGUMENT",
        "page_token is not one that this method returned for the same filter; begin again without page_token",
        param="page_token",
    )
