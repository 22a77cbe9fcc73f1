"""Checks of a grammar that need no compiler. Pure, standard library only."""

from __future__ import annotations

import json
from typing import Any

from engine.errors import RequestError
from engine.grammar import json_schema
from engine.request import Grammar

MAX_SOURCE_BYTES = 64 << 10


def check_grammar(grammar: Grammar) -> None:
    """Refuse a grammar that is invalid for every compiler. Raises RequestError: INVALID_GRAMMAR."""
    if len(grammar.source.encode(errors="surrogatepass")) > MAX_SOURCE_BYTES:
        raise invalid_grammar(grammar, f"it has more than {MAX_SOURCE_BYTES} bytes")
    match grammar.kind:
        case "json_schema":
            problem = json_schema.find_problem(grammar.source)
            if problem is not None:
                raise invalid_grammar(grammar, problem)
        case "json_object":
            if grammar.source:
                raise invalid_grammar(grammar, "json_object takes no source")
        case "regex":
            if not grammar.source:
                raise invalid_grammar(grammar, "it is empty")
        case "choice":
            texts = _parse_texts(grammar.source)
            if not texts or not all(isinstance(text, str) and text for text in texts):
                raise invalid_grammar(grammar, "it must be a list of texts, none of them empty")
        case _:
            raise invalid_grammar(grammar, "its kind is unknown")


def _parse_texts(source: str) -> list[Any]:
    try:
        texts = json.loads(source)
    except (ValueError, RecursionError):
        return []
    return texts if isinstance(texts, list) else []


def invalid_grammar(grammar: Grammar, problem: str) -> RequestError:
    """The error for a grammar that cannot be followed."""
    name = grammar.kind.replace("_", " ")
    return RequestError("INVALID_GRAMMAR", f"the {name} cannot be followed: {problem}")
