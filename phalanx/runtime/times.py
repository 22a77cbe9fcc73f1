"""Times between Python and protobuf."""

from __future__ import annotations

from google.protobuf import timestamp_pb2


def timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    """Seconds since the Unix epoch as a Timestamp, rounded to microseconds, the precision of a float."""
    message = timestamp_pb2.Timestamp()
    message.FromMicroseconds(round(seconds * 1e6))
    return message
