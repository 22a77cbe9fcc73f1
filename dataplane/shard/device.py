"""What a worker knows of its device before an engine runs on it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dataplane.shard.health import handle_of

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

log = logging.getLogger(__name__)


def memory_bytes(device: str, cgroup_limit: Path = _CGROUP_LIMIT) -> int:
    """Memory of "cpu", which is the host's or what a container may have of it, or of "cuda:N"; 0: unknown."""
    if device != "cpu":
        return _gpu_memory(index_of(device))
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = cgroup_limit.read_text().strip()
    except OSError:
        return host
    return min(host, int(limit)) if limit.isdecimal() else host


def index_of(device: str) -> int:
    """N of "cuda:N"."""
    return int(device.partition(":")[2] or 0)


def _gpu_memory(index: int) -> int:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle_of(pynvml, index)).total)
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:  # of the driver or its library: the engine will say more
        log.warning("the device's memory is not known", extra={"reason": repr(error)})
        return 0
