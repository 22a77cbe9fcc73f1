"""Forks engines: `python -m engine.processes.forkserver --fd N`, N an inherited SOCK_SEQPACKET socket.

Importing torch takes seconds of a core; forking a process that has imported it takes milliseconds. The client
is a worker. The messages on the socket:

    server -> client  ready             once, after the imports
    client -> server  fork              with the descriptors of an engine's link and, for rank 0, of its
                                        socket to the text process
    server -> client  forked PID        with a pidfd, which stays valid when the PID is reused
    server -> client  ended PID CODE    when it ends; CODE is negative for a signal, as in `subprocess`

A closed socket ends this process, and the kernel then kills every engine.

No other thread may run while `serve` forks: the child would have that thread's locks, but not the thread.
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
from engine.processes import rank

# These import every module that a start imports inside functions: a fork must not import them again.
PRELOADED = (
    "engine.processes.core",
    "engine.grammar.service",
    "engine.distributed.rendezvous",
    "engine.execution.runner",
    "engine.kernels.choose",
    "engine.weights.loader",
)
_MAX_MESSAGE = 64  # bytes


def main() -> None:
    """Import, then fork until the socket closes."""
    parser = argparse.ArgumentParser(description="Forks engines.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket")
    connection = socket.socket(fileno=parser.parse_args().fd)
    die_with_parent()
    import_in_background(*PRELOADED)
    gc.collect()
    gc.freeze()  # else the first garbage collection of every engine copies all shared pages
    connection.send(b"ready")
    serve(connection)


def serve(connection: socket.socket) -> None:
    """Fork an engine on request, and report every engine that ends."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    engines: dict[int, int] = {}  # process ids by pidfd
    while True:
        for fd, _ in poll.poll():
            if fd != connection.fileno():
                poll.unregister(fd)
                _, status = os.waitpid(engines[fd], 0)
                os.close(fd)
                connection.send(b"ended %d %d" % (engines.pop(fd), os.waitstatus_to_exitcode(status)))
                continue
            request, descriptors, _, _ = socket.recv_fds(connection, _MAX_MESSAGE, 2)
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
    """Run an engine in this forked process; never returns."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    random.seed()
    try:
        rank.run(link, text, survive_thread=False)
    finally:
        os._exit(1)


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the worker has gone
