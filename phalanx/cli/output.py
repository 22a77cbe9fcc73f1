"""Prints rows: as a table for people, as JSON or YAML for scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def row(message: Any) -> dict[str, Any]:
    """A protobuf message as plain values, field by field in the message's order.

    None stands for an unset field and for an empty text. States are lower-case words, times are RFC 3339.
    """
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def _value(message: Any, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_single(item, field) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _single(value, field)


def _single(value: Any, field: Any) -> Any:
    """The value of a field that is set, or one item of a repeated field."""
    if field.message_type is not None:
        is_time = field.message_type.full_name == "google.protobuf.Timestamp"
        return value.ToJsonString() if is_time else row(value)
    if field.enum_type is not None:
        from phalanx.runtime.enums import word

        value = word(field.enum_type, value)
    return None if value == "" else value


def render(rows: Sequence[Row], columns: Sequence[str], output_format: str) -> str:
    """The text to print. A table shows `columns` alone; JSON and YAML show every field."""
    if output_format == "json":
        return json.dumps(rows, indent=2)
    if output_format == "yaml":
        import yaml

        return str(yaml.safe_dump(rows, sort_keys=False)).rstrip()
    return table(rows, columns)


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Columns aligned to the left under capital headings; `-` stands for None."""
    cells = [[name.upper().replace("_", " ") for name in columns]]
    cells += [["-" if item[name] is None else str(item[name]) for name in columns] for item in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "   ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
