"""Facts about a worker's device that need no engine."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dataplane.shard.health import handle_of

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

log = logging.getLogger(__name__)


def memory_bytes(device: str, cgroup_limit: Path = _CGROUP_LIMIT) -> int:
    """Bytes of memory of "cpu" (the host's or its container's limit) or of "cuda:N"; 0 if unknown."""
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
    except Exception as error:  # of the driver or its library; an engine that fails will explain more
        log.warning("the device's memory is not known", extra={"reason": repr(error)})
        return 0
