"""The pages of list requests."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from phalanx.runtime import opaque
from phalanx.runtime.errors import PhalanxError
from phalanx.runtime.filters import Fields
from phalanx.runtime.paging import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, page
from phalanx.v1 import control_pb2

FIELDS = Fields(control_pb2.Gateway.DESCRIPTOR, "gateway", "host")
OTHERS = Fields(control_pb2.Worker.DESCRIPTOR, "worker", "host")
Items = dict[str, control_pb2.Gateway]


def items(names: list[str]) -> Items:
    """Gateways on two hosts."""
    return {
        name: control_pb2.Gateway(gateway=name, host="ab"[number % 2]) for number, name in enumerate(names)
    }


def request(size: int = 0, token: str = "", filter: str = "") -> control_pb2.ListGatewaysRequest:
    return control_pb2.ListGatewaysRequest(page_size=size, page_token=token, filter=filter)


def pages(of: Items, size: int, filter: str = "") -> list[list[str]]:
    """The names on every page, as a client that follows the tokens gets them."""
    found, token = [], ""
    while not found or token:
        listed, token = page(of, request(size, token, filter), FIELDS)
        found.append([item.gateway for item in listed])
        assert len(found) <= len(of) + 1, "the pages do not end"
    return found


def numbered(count: int) -> Items:
    return items([f"g{number:04d}" for number in range(count)])


NAMES = st.lists(st.text(max_size=4), unique=True, max_size=30)


@given(NAMES, st.integers(1, 40), st.sampled_from(["", 'host = "a"']))
@example([], 1, "")
@example(["", "a"], 1, "")
def test_any_page_size_gives_every_item_once_in_order(names: list[str], size: int, filter: str) -> None:
    of = items(names)
    wanted = sorted(name for name in names if not filter or of[name].host == "a")
    found = pages(of, size, filter)
    assert [name for names in found for name in names] == wanted
    assert all(len(names) == size for names in found[:-1])
    assert found[-1] or not wanted, "no empty page at the end"


@given(NAMES, NAMES, st.integers(1, 5))
def test_what_stays_is_given_once_while_others_come_and_go(
    before: list[str], after: list[str], size: int
) -> None:
    first, token = page(items(before), request(size), FIELDS)
    found = [item.gateway for item in first]
    while token:
        listed, token = page(items(after), request(size, token), FIELDS)
        found += [item.gateway for item in listed]
        assert len(found) <= len(before) + len(after), "the pages do not end"
    assert found == sorted(set(found))
    if len(before) > size:
        assert set(found) >= set(before) & set(after)


@pytest.mark.parametrize(
    ("asked", "given"),
    [(0, DEFAULT_PAGE_SIZE), (1, 1), (MAX_PAGE_SIZE, MAX_PAGE_SIZE), (MAX_PAGE_SIZE + 1, MAX_PAGE_SIZE)],
)
def test_a_page_has_the_documented_size(asked: int, given: int) -> None:
    listed, token = page(numbered(MAX_PAGE_SIZE + 5), request(asked), FIELDS)
    assert len(listed) == given
    assert token


def test_a_full_last_page_has_no_token() -> None:
    assert page(numbered(4), request(4), FIELDS)[1] == ""


def test_a_page_may_have_another_size_than_the_one_before() -> None:
    of = numbered(5)
    _, token = page(of, request(2), FIELDS)
    listed, _ = page(of, request(3, token), FIELDS)
    assert [item.gateway for item in listed] == ["g0002", "g0003", "g0004"]


def test_a_negative_page_size_is_refused() -> None:
    with pytest.raises(PhalanxError) as caught:
        page(numbered(1), request(-1), FIELDS)
    assert (caught.value.reason, caught.value.param) == ("INVALID_ARGUMENT", "page_size")


TOKEN = page(numbered(3), request(1), FIELDS)[1]


@pytest.mark.parametrize(
    ("token", "filter", "fields"),
    [
        (TOKEN, 'host = "a"', FIELDS),
        (TOKEN, "", OTHERS),
        ("g0000", "", FIELDS),
        (TOKEN + "=", "", FIELDS),
        (opaque.encode(b"\x02" + opaque.decode(TOKEN)[1:]), "", FIELDS),
        (opaque.encode(opaque.decode(TOKEN) + b"\xff"), "", FIELDS),
        ("é", "", FIELDS),
    ],
)
def test_a_token_of_another_request_is_refused(token: str, filter: str, fields: Fields) -> None:
    with pytest.raises(PhalanxError) as caught:
        page(numbered(3), request(1, token, filter), fields)
    assert (caught.value.reason, caught.value.param) == ("INVALID_ARGUMENT", "page_token")
    assert "begin again without page_token" in caught.value.message


def test_a_token_does_not_show_a_name() -> None:
    assert "g0000" not in TOKEN
