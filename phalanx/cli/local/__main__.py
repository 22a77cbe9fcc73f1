"""The supervisor process: `python -m phalanx.cli.local SPEC LOCK_FD PROGRESS_FD TETHER_FD`."""

from __future__ import annotations

import asyncio
import os
import sys

from phalanx.cli.local import lock
from phalanx.cli.local.keeper import Keeper
from phalanx.cli.local.spec import LocalSpec
from phalanx.runtime import logs


def main() -> int:
    """Keep a cluster running until it is asked to stop. This process holds the lock until it ends."""
    spec = LocalSpec.from_json(sys.argv[1])
    lock_fd, progress_fd, tether_fd = (int(argument) for argument in sys.argv[2:5])
    for fd in (lock_fd, progress_fd, tether_fd):
        os.set_inheritable(fd, False)
    logs.setup("supervisor", "supervisor-0")
    lock.sign(lock_fd)
    return asyncio.run(Keeper(spec, progress_fd).run(tether_fd))


if __name__ == "__main__":
    sys.exit(main())
