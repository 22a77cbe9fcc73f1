"""What a grammar must be like before a compiler is asked. Pure, standard library only."""

from __future__ import annotations

import json
from typing import Any

from engine.errors import RequestError
from engine.grammar import json_schema
from engine.request import Grammar

MAX_SOURCE_BYTES = 64 << 10


def check(grammar: Grammar) -> None:
    """Refuse what needs no compiler to be refused. Raises RequestError INVALID_GRAMMAR."""
    if len(grammar.source.encode()) > MAX_SOURCE_BYTES:
        raise invalid(grammar, f"it has more than {MAX_SOURCE_BYTES} bytes")
    match grammar.kind:
        case "json_schema":
            problem = json_schema.problem(grammar.source)
            if problem is not None:
                raise invalid(grammar, problem)
        case "json_object":
            if grammar.source:
                raise invalid(grammar, "any JSON object has no source")
        case "regex":
            if not grammar.source:
                raise invalid(grammar, "it is empty")
        case "choice":
            texts = _texts(grammar.source)
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise invalid(grammar, "it must be texts, none of them empty")
        case _:
            raise invalid(grammar, "its kind is unknown")


def _texts(source: str) -> list[Any]:
    try:
        texts = json.loads(source)
    except (ValueError, RecursionError):
        return []
    return texts if isinstance(texts, list) else []


def invalid(grammar: Grammar, problem: str) -> RequestError:
    """The refusal of a grammar."""
    name = grammar.kind.replace("_", " ")
    return RequestError("INVALID_GRAMMAR", f"the {name} cannot be followed: {problem}")
