"""How a process tells the one that started it that it serves, and where."""

from __future__ import annotations

import json
import os


def announce(fd: int | None, addresses: dict[str, str]) -> None:
    """Write one JSON line to the inherited descriptor and close it; nothing when there is none."""
    if fd is None:
        return
    with os.fdopen(fd, "w") as pipe:
        pipe.write(json.dumps(addresses) + "\n")
