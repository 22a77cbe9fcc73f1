"""Rows as a table for people, or as JSON or YAML for scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def row(message: Any) -> dict[str, Any]:
    """A protobuf message as plain values: fields in their order, None where unset or empty text."""
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def _value(message: Any, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [row(item) if field.message_type else item for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    if field.message_type:
        return row(value)
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
    """Columns aligned at the left under capital headings; `-` where there is no value."""
    cells = [[name.upper().replace("_", " ") for name in columns]]
    cells += [["-" if item[name] is None else str(item[name]) for name in columns] for item in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "   ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
