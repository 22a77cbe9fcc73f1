"""Enums of the public API as people read them: WORKER_STATE_READY is "ready"."""

from __future__ import annotations

from google.protobuf.descriptor import EnumDescriptor


def word(enum: EnumDescriptor, number: int) -> str:
    """A value's name in lower case, without the enum's prefix; "" for UNSPECIFIED.

    A number that this version does not know is its own digits.
    """
    unspecified = enum.values_by_number[0].name
    if number == 0:
        return ""
    value = enum.values_by_number.get(number)
    return value.name.removeprefix(unspecified.removesuffix("UNSPECIFIED")).lower() if value else str(number)
