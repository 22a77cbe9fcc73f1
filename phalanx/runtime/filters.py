r"""The filters of list requests, a subset of https://google.aip.dev/160. Pure.

filter = [ term { "AND" term } ]
term   = field "=" '"' { character | '\"' | '\\' } '"'

The work per message is bounded, because `Fields.parse` refuses long texts and drops repeated terms. A server
evaluates filters on its event loop, so a long filter would hold up everything else there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from phalanx.runtime.errors import PhalanxError

MAX_CHARS = 8192  # of a filter; the longest useful value is a path of 4,096 bytes
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_EQUALS = re.compile(r"\s*=\s*")
_VALUE = re.compile(r'"(?:[^"\\]|\\["\\])*"')
_AND = re.compile(r"\s+AND\s+")
_ESCAPE = re.compile(r"\\(.)")
_FORM = 'a filter is field = "value" [AND field = "value" ...]'


@dataclass(frozen=True, slots=True)
class Term:
    """One condition: the field has this value. An enum's value is its number."""

    field: str
    value: str | int


@dataclass(frozen=True, slots=True)
class Filter:
    """Every term must hold; without terms everything matches."""

    terms: tuple[Term, ...] = ()

    def matches(self, message: Any) -> bool:
        """Whether a message has the value of every term. An unset field has the value ""."""
        return all(_get(message, term.field) == term.value for term in self.terms)


class Fields:
    """The fields that a list method accepts in filters: strings and enums of one message type.

    A path with dots leads into nested messages.
    """

    def __init__(self, message: Descriptor, *paths: str) -> None:
        self.collection = message.full_name
        self._fields: Mapping[str, FieldDescriptor] = {path: _find(message, path) for path in paths}

    def parse(self, text: str) -> Filter:
        """The filter in `text`.

        Raises:
            PhalanxError: INVALID_ARGUMENT, which names the wrong field or quotes the wrong text.
        """
        if len(text) > MAX_CHARS:
            _refuse(f"it must have at most {MAX_CHARS} characters")
        text, at = text.strip(), 0
        terms: list[Term] = []
        while at < len(text):
            if terms:
                separator = _AND.match(text, at)
                if separator is None:
                    _refuse(f"expected AND after the value of {terms[-1].field} instead of {_rest(text, at)}")
                at = separator.end()
            term, at = self._term(text, at)
            terms.append(term)
        return Filter(tuple(dict.fromkeys(terms)))

    def _term(self, text: str, at: int) -> tuple[Term, int]:
        """The term that begins at index `at` of the text, and the index after it."""
        name = _FIELD.match(text, at)
        if name is None:
            _refuse(f"expected a field instead of {_rest(text, at)}; {_FORM}")
        field = self._fields.get(name[0])
        if field is None:
            _refuse(f"{name[0]} is not a field to filter by; these are: {', '.join(self._fields)}")
        equals = _EQUALS.match(text, name.end())
        if equals is None:
            _refuse(f"expected = after {name[0]} instead of {_rest(text, name.end())}; {_FORM}")
        quoted = _VALUE.match(text, equals.end())
        if quoted is None:
            _refuse(f'the value of {name[0]} must be in quotation marks, with \\ before every " and \\ in it')
        value = _ESCAPE.sub(r"\1", quoted[0][1:-1])
        if field.enum_type is None:
            return Term(name[0], value), quoted.end()
        values = field.enum_type.values_by_name
        if value not in values:
            _refuse(f"{name[0]} has no value {value!r}; its values are: {', '.join(values)}")
        return Term(name[0], values[value].number), quoted.end()


def _find(message: Descriptor, path: str) -> FieldDescriptor:
    name, _, rest = path.partition(".")
    field = message.fields_by_name[name]
    if not rest:
        return field
    assert field.message_type is not None
    return _find(field.message_type, rest)


def _get(message: Any, path: str) -> Any:
    for name in path.split("."):
        message = getattr(message, name)
    return message


def _rest(text: str, at: int) -> str:
    """The next characters of the text, quoted for an error message."""
    return repr(text[at : at + 20]) if at < len(text) else "the end"


def _refuse(message: str) -> NoReturn:
    raise PhalanxError("INVALID_ARGUMENT", f"filter: {message}", param="filter")
