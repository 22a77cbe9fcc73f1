"""Forks engines: `python -m engine.processes.forkserver --fd N`, N an inherited SOCK_SEQPACKET socket.

Importing torch takes seconds of a core; forking a process that has done so takes milliseconds. First of all
the other end of the socket hears `ready`. It sends `fork` with the descriptors of an engine's link and, for
rank 0, of its socket to the text process. It hears `forked PID` with a pidfd, which names that process for
ever, and at its end `ended PID CODE`, as of `subprocess`. A closed socket ends this process, and with it
every engine.

No thread may run beside `serve`: a fork takes only the one that forks.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import select
import signal
import socket
import sys

from engine.ipc.background import import_in_background
from engine.ipc.link import die_with_parent
from engine.processes import rank as process

_REQUEST = 64


def main() -> None:
    """Import, then fork until the socket closes."""
    parser = argparse.ArgumentParser(description="Forks engines.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket")
    connection = socket.socket(fileno=parser.parse_args().fd)
    die_with_parent()
    # What `engine.processes.startup.join` imports.
    import_in_background(
        "engine.processes.core",
        "engine.grammar.grammars",
        "engine.distributed.parallel",
        "engine.execution.runner",
        "engine.weights.loader",
    )
    gc.collect()
    gc.freeze()  # or the first collection of every engine would copy all pages
    connection.send(b"ready")
    serve(connection)


def serve(connection: socket.socket) -> None:
    """Fork when asked, and tell how engines end."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    engines: dict[int, int] = {}  # by pidfd
    while True:
        for fd, _ in poll.poll():
            if fd != connection.fileno():
                poll.unregister(fd)
                _, status = os.waitpid(engines[fd], 0)
                os.close(fd)
                connection.send(b"ended %d %d" % (engines.pop(fd), os.waitstatus_to_exitcode(status)))
                continue
            request, descriptors, _, _ = socket.recv_fds(connection, _REQUEST, 2)
            if not request:
                return
            pid = os.fork()
            if pid == 0:
                connection.close()
                for other in engines:
                    os.close(other)
                _become_engine(*descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            pidfd = os.pidfd_open(pid)
            engines[pidfd] = pid
            poll.register(pidfd, select.POLLIN)
            socket.send_fds(connection, [b"forked %d" % pid], [pidfd])


def _become_engine(link: int, text: int | None = None) -> None:
    """Never returns."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    random.seed()
    try:
        process.run(link, text, survive_thread=False)
    finally:
        os._exit(1)


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the parent has gone
