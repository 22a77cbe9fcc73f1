from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.grammar.json_schema import _ANNOTATIONS, _KEYWORDS, find_problem, with_string_patterns

NESTED: dict[str, Any] = {"type": "integer"}
for _ in range(100):
    NESTED = {"type": "array", "items": NESTED}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        {"type": "object"},
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a"]},
        {"type": "array", "items": {"anyOf": [{"type": "null"}, {"enum": [1, "x"]}]}, "maxItems": 3},
        {"$defs": {"node": {"type": "integer", "multipleOf": 3}}, "$ref": "#/$defs/node", "title": "A node"},
        {"type": ["string", "null"], "format": "date-time"},
        {"type": "number", "enum": [1, 2.5]},
        {"type": "array", "uniqueItems": False},
    ],
)
def test_what_can_be_enforced_passes(schema: Any) -> None:
    assert find_problem(json.dumps(schema)) is None


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "array", "contains": {"const": 1}}, "'contains'"),
        ({"not": {"type": "integer"}}, "'not'"),
        ({"if": {"type": "integer"}, "then": {}}, "'if'"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
        ({"type": "string", "format": "idn-email"}, "'idn-email'"),
        ({"type": "string", "pattern": "a", "minLength": 2}, "'pattern'"),
        ({"type": "number", "multipleOf": 0.5}, "'multipleOf'"),
        ({"minimum": 3}, "without a type"),
        ({"allOf": [{"type": "integer"}, {"type": "number"}]}, "'allOf'"),
        ({"type": "integer", "enum": [1, "x"]}, "not of its type"),
        ({"type": "integer", "enum": [True]}, "not of its type"),
        ({"type": "object", "required": ["b"]}, "'b'"),
        ({"type": "whatever"}, "'whatever'"),
        ({"$ref": "https://example.org/schema"}, "not part of the schema"),
        ({"type": "object", "properties": {"a": {"items": [{"not": {}}]}}}, "#/properties/a/items"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "#/properties/a uses 'not'"),
        ({"$defs": {"a": {"anyOf": [{"not": {}}]}}}, "#/$defs/a/anyOf/0 uses 'not'"),
        ({"properties": []}, "#/properties is not of the right type"),
        ({"anyOf": {}}, "#/anyOf is not of the right type"),
        ([], "neither an object nor a boolean"),
        (NESTED, "nested more than 64 deep"),
    ],
)
def test_what_cannot_be_enforced_is_named(schema: Any, what: str) -> None:
    found = find_problem(json.dumps(schema))
    assert found is not None
    assert what in found


def test_what_is_no_json_is_refused() -> None:
    assert "not JSON" in str(find_problem('{"type":'))
    assert "not JSON" in str(find_problem("[" * 100_000))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(-2, 2)
    | st.sampled_from(["integer", "#", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(sorted(_KEYWORDS | _ANNOTATIONS)), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(sorted(_KEYWORDS | _ANNOTATIONS)), values, max_size=4))
def test_whatever_is_sent_gets_a_verdict(schema: Any) -> None:
    found = find_problem(json.dumps(schema))
    assert found is None or found.startswith("#")


def test_only_limits_of_strings_become_patterns() -> None:
    array = {"type": "array", "items": {"type": ["string", "null"], "minLength": 2}, "maxItems": 4}
    schema = {
        "type": "object",
        "properties": {"type": {"type": "string", "maxLength": 3}, "b": array, "c": {"type": "string"}},
        "enum": [{"type": "string", "maxLength": 3}],
    }
    assert with_string_patterns(schema) == {
        **schema,
        "properties": {
            "type": {"type": "string", "pattern": r'^[^"\\\x00-\x1f]{0,3}$'},
            "b": {**array, "items": {"type": ["string", "null"], "pattern": r'^[^"\\\x00-\x1f]{2,}$'}},
            "c": {"type": "string"},
        },
    }
