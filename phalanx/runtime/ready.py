"""Tells the parent process that this process serves, and at which addresses."""

from __future__ import annotations

import json
import os


def announce(fd: int | None, addresses: dict[str, str]) -> None:
    """Write the addresses as one JSON line to the inherited descriptor, and close it. None does nothing."""
    if fd is None:
        return
    with os.fdopen(fd, "w") as pipe:
        pipe.write(json.dumps(addresses) + "\n")
