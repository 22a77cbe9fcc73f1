"""Which JSON Schemas can be enforced completely. Pure.

The grammar compiler silently ignores keywords that it cannot express, and then an answer may break its
schema. This file refuses such keywords by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_ANNOTATIONS = frozenset(
    {
        "$schema", "$id", "$comment", "$anchor", "$defs", "definitions", "title", "description", "default",
        "example", "examples", "deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType",
    }
)  # fmt: skip
_KEYWORDS_OF = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "array": {"items", "prefixItems", "additionalItems", "unevaluatedItems", "minItems", "maxItems"},
    "object": {
        "properties", "required", "additionalProperties", "unevaluatedProperties", "patternProperties",
        "propertyNames", "minProperties", "maxProperties",
    },
}  # fmt: skip
_KEYWORDS = frozenset().union(*_KEYWORDS_OF.values()) | {
    "type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf",
}  # fmt: skip
_FORMATS = frozenset(
    {
        "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uri-reference",
        "uri-template", "uuid", "json-pointer", "relative-json-pointer",
    }
)  # fmt: skip
_NEED_A_TYPE = _KEYWORDS_OF["string"] | _KEYWORDS_OF["number"]
_ONE_SUBSCHEMA = (
    "items",
    "additionalItems",
    "unevaluatedItems",
    "additionalProperties",
    "unevaluatedProperties",
    "propertyNames",
)
_LIST_OF_SUBSCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED_SUBSCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_MAX_NESTING = 64
_NUMBER = (int, float)
_VALUE_TYPES: dict[str, type | tuple[type, ...]] = {
    "type": (str, list), "enum": list, "required": list, "$ref": str, "pattern": str, "format": str,
    **dict.fromkeys(_LIST_OF_SUBSCHEMAS, list),
    **dict.fromkeys(_NAMED_SUBSCHEMAS, dict),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), int),
    **dict.fromkeys(("minProperties", "maxProperties"), int),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), _NUMBER),
}  # fmt: skip
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
    "array": (list,), "object": (dict,),
}  # fmt: skip


def find_problem(source: str) -> str | None:
    """Why a schema, given as JSON text, cannot be enforced completely. None if it can."""
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON: {error}"
    return next(_problems(schema, "#", schema, 0), None)


def _problems(schema: Any, at: str, root: Any, depth: int) -> Iterator[str]:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        yield f"{at} is neither an object nor a boolean"
        return
    if depth > _MAX_NESTING:
        yield f"{at} is nested more than {_MAX_NESTING} deep"
        return
    for keyword in schema:
        if keyword not in _KEYWORDS | _ANNOTATIONS and not (keyword == "uniqueItems" and not schema[keyword]):
            yield f"{at} uses {keyword!r}, which cannot be enforced"
    for keyword, types in _VALUE_TYPES.items():
        if keyword in schema and not isinstance(schema[keyword], types):
            yield f"{at}/{keyword} is not of the right type"
            return
    yield from _problems_at(schema, at)
    for name in _ONE_SUBSCHEMA:
        if name in schema:
            yield from _problems(schema[name], f"{at}/{name}", root, depth + 1)
    for name in _LIST_OF_SUBSCHEMAS:
        for index, entry in enumerate(schema.get(name, [])):
            yield from _problems(entry, f"{at}/{name}/{index}", root, depth + 1)
    for name in _NAMED_SUBSCHEMAS:
        for key, entry in schema.get(name, {}).items():
            yield from _problems(entry, f"{at}/{name}/{key}", root, depth + 1)


def _problems_at(schema: dict[str, Any], at: str) -> Iterator[str]:
    """Problems of a schema's own keywords, without its subschemas."""
    types = schema.get("type", [])
    types = types if isinstance(types, list) else [types]
    for name in types:
        if not isinstance(name, str) or name not in _JSON_TYPES:
            yield f"{at}/type names {name!r}, which is no type"
            return
    untyped = sorted(_NEED_A_TYPE & schema.keys())
    if untyped and not types:
        yield f"{at} uses {untyped[0]!r} without a type"
    if "format" in schema and schema["format"] not in _FORMATS:
        yield f"{at} uses format {schema['format']!r}, which cannot be enforced"
    if "pattern" in schema and {"minLength", "maxLength"} & schema.keys():
        yield f"{at} uses 'pattern' beside a length, of which only one can be enforced"
    if "multipleOf" in schema and types != ["integer"]:
        yield f"{at} uses 'multipleOf', which can be enforced for type integer alone"
    if len(schema.get("allOf", ())) > 1:
        yield f"{at} uses 'allOf' with more than one schema, which cannot be enforced"
    if "$ref" in schema and not str(schema["$ref"]).startswith("#"):
        yield f"{at} refers to {schema['$ref']!r}, which is not part of the schema"
    if types and "enum" in schema:
        allowed = tuple(kind for name in types for kind in _JSON_TYPES[name])
        if not all(_is_instance(value, allowed) for value in schema["enum"]):
            yield f"{at}/enum has a value that is not of its type"
    properties = schema.get("properties", {})
    for name in schema.get("required", []):
        if not isinstance(name, str) or name not in properties:
            yield f"{at} requires {name!r}, which is not among its properties"


def _is_instance(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


def with_string_patterns(schema: Any) -> Any:
    """The same schema, with limits of string lengths replaced by patterns.

    For a limited length, xgrammar allows control characters in a string, which JSON forbids.
    """
    if isinstance(schema, list):
        return [with_string_patterns(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    rest = {
        name: entry if name in ("enum", "const", "default", "examples") else with_string_patterns(entry)
        for name, entry in schema.items()
    }
    kind = schema.get("type")
    lengths = {"minLength", "maxLength"} & schema.keys()
    if lengths and (kind == "string" or (isinstance(kind, list) and "string" in kind)):
        longest = rest.pop("maxLength", "")
        rest["pattern"] = rf'^[^"\\\x00-\x1f]{{{rest.pop("minLength", 0)},{longest}}}$'
    return rest
