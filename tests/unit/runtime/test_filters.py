"""The filter of list requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.runtime.errors import PhalanxError
from phalanx.runtime.filters import MAX_CHARS, Fields, Filter, Term
from phalanx.v1 import control_pb2

WORKERS = Fields(control_pb2.Worker.DESCRIPTOR, "worker", "host", "state", "replica")
DEPLOYMENTS = Fields(control_pb2.Deployment.DESCRIPTOR, "spec.name", "state")
READY = control_pb2.Worker(
    worker="w0", host='a "b" \\ AND c', state=control_pb2.WORKER_STATE_READY, replica="a-0"
)


def refusal(text: str) -> PhalanxError:
    with pytest.raises(PhalanxError) as caught:
        WORKERS.parse(text)
    assert (caught.value.reason, caught.value.param) == ("INVALID_ARGUMENT", "filter")
    return caught.value


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_an_empty_filter_selects_everything(text: str) -> None:
    assert WORKERS.parse(text) == Filter()
    assert WORKERS.parse(text).matches(READY)


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ('worker = "w0"', True),
        ('worker="w0"', True),
        ('  worker\t=\n"w0"  ', True),
        ('worker = "w1"', False),
        ('worker = "W0"', False),
        ('worker = "w"', False),
        ('state = "WORKER_STATE_READY"', True),
        ('state = "WORKER_STATE_FREE"', False),
        ('worker = "w0" AND replica = "a-0"', True),
        ('worker = "w0" AND replica = "a-1"', False),
        ('worker = "w0" AND worker = "w1"', False),
        (r'host = "a \"b\" \\ AND c"', True),
        ('replica = ""', False),
    ],
)
def test_every_term_must_hold(text: str, matches: bool) -> None:
    assert WORKERS.parse(text).matches(READY) is matches


def test_an_unset_field_has_the_empty_value() -> None:
    assert WORKERS.parse('replica = ""').matches(control_pb2.Worker(worker="w0"))


def test_a_path_leads_into_a_nested_message() -> None:
    deployment = control_pb2.Deployment(spec=control_pb2.DeploymentSpec(name="a"))
    assert DEPLOYMENTS.parse('spec.name = "a"').matches(deployment)
    assert not DEPLOYMENTS.parse('spec.name = "b"').matches(deployment)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('pid = "1"', "pid is not a field to filter by; these are: worker, host, state, replica"),
        ('spec.name = "a"', "spec.name is not a field"),
        ("worker", "expected = after worker instead of the end"),
        ('worker != "a"', "expected = after worker instead of ' != \"a\"'"),
        ('worker : "a"', "expected = after worker"),
        ("worker = w0", "the value of worker must be in quotation marks"),
        ("worker = 'w0'", "the value of worker must be in quotation marks"),
        ('worker = "w0', "the value of worker must be in quotation marks"),
        (r'worker = "\n"', "the value of worker must be in quotation marks"),
        ("worker = ", "the value of worker must be in quotation marks"),
        ('state = "ready"', "state has no value 'ready'; its values are: WORKER_STATE_UNSPECIFIED"),
        ('worker = "a" OR worker = "b"', "expected AND after the value of worker instead of ' OR worker"),
        ('worker = "a" and worker = "b"', "expected AND after the value of worker"),
        ('worker = "a"AND worker = "b"', "expected AND after the value of worker"),
        ('worker = "a" host = "b"', "expected AND after the value of worker"),
        ('worker = "a" AND', "expected AND after the value of worker"),
        ('worker = "a" AND = "b"', "expected a field instead of '= \"b\"'"),
        ('NOT worker = "a"', "NOT is not a field"),
        ('(worker = "a")', "expected a field instead of '(worker"),
        ('"w0"', "expected a field"),
    ],
)
def test_a_bad_filter_is_refused_with_the_field(text: str, says: str) -> None:
    assert says in refusal(text).message


def test_a_filter_costs_little_however_a_client_writes_it() -> None:
    """The server evaluates it for every item on its event loop."""
    longest = 'worker = "w0"'.ljust(MAX_CHARS)
    assert WORKERS.parse(longest).matches(READY)
    assert "at most 8192 characters" in refusal(longest + " ").message
    assert WORKERS.parse(" AND ".join(['worker = "w0"'] * 400)) == Filter((Term("worker", "w0"),))


FIELD_VALUES = st.tuples(st.sampled_from(["worker", "host", "replica"]), st.text(max_size=12))
SPACE = st.sampled_from(["", " ", "\n "])


@given(st.lists(st.tuples(FIELD_VALUES, SPACE, SPACE), max_size=5))
def test_what_is_written_is_read(pieces: list[tuple[tuple[str, str], str, str]]) -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    text = " AND ".join(f"{field}{before}={after}{quoted(value)}" for (field, value), before, after in pieces)
    terms = tuple(Term(field, value) for (field, value), _, _ in pieces)
    assert WORKERS.parse(text) == Filter(tuple(dict.fromkeys(terms)))


WORDS = ["worker", "state", "x", "=", '"', "\\", " ", "AND", "OR", "WORKER_STATE_FREE", "é"]


@given(st.lists(st.sampled_from(WORDS), max_size=12).map("".join))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    try:
        parsed = WORKERS.parse(text)
    except PhalanxError as error:
        assert error.reason == "INVALID_ARGUMENT"  # noqa: PT017
    else:
        parsed.matches(READY)
