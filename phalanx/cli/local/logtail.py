"""Why a program ended, according to its exit status and the end of its log."""

from __future__ import annotations

import json
import signal
from pathlib import Path

_TAIL_BYTES = 16_384
_ERROR_LEVELS = {"error", "critical", "fatal", "panic"}


def exit_reason(name: str, code: int, path: Path) -> str:
    """One sentence with the exit status and the last message of the log."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    said = last_words(path)
    return f"{name} {how}" + (f": {said}" if said else "") + f" (log: {path})"


def last_words(path: Path) -> str:
    """The message in the last line of a log; empty for a structured line that is no error."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    if not isinstance(entry, dict):
        return line
    exception = str(entry.get("exception", "")).strip().splitlines()
    if exception:
        return exception[-1]
    return str(entry.get("event", entry.get("msg", ""))) if entry.get("level") in _ERROR_LEVELS else ""
