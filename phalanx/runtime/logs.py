"""Structured logs: one JSON object per line on standard error. Never log prompts or tokens."""

from __future__ import annotations

import json
import logging
import sys
import time

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Writes a log record as a JSON object; the fields of `extra={...}` become fields of the object."""

    def __init__(self, role: str, name: str) -> None:
        super().__init__()
        self._process = {"role": role, "name": name}

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **self._process,
            "event": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def setup(role: str, name: str, level: int = logging.INFO) -> None:
    """Send this process's logs to standard error, with its role and name in each line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(role, name))
    logging.basicConfig(level=level, handlers=[handler], force=True)
