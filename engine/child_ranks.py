"""The ranks of an offline engine beside rank 0: child processes, `python -m engine.processes.rank`.

Owns: the processes and the sockets to them. Does not own: rank 0, which runs in the caller's process.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable

from engine.config import EngineConfig
from engine.errors import EngineError, ModelError
from engine.ipc.link import Link, LinkClosedError
from engine.ipc.wire import EngineFailed, Rendezvous, StartEngine

StartProcess = Callable[[socket.socket], subprocess.Popen[bytes]]


class ChildRanks:
    """Starts the child ranks of one replica, and reports the first one that has failed."""

    def __init__(self) -> None:
        self._children: list[tuple[subprocess.Popen[bytes], Link]] = []  # of rank 1, 2, and so on

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """The processes of rank 1, 2, and so on."""
        return [process for process, _ in self._children]

    def start(self, config: EngineConfig, start_process: StartProcess) -> None:
        """Start the rank `config.rank`. The first call is for rank 1, each later one for the next rank.

        Args:
            config: of the rank.
            start_process: starts a process that takes over this end of its socket.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = start_process(theirs)
        link = Link(ours)
        self._children.append((process, link))
        link.send(StartEngine(config))

    def announce(self, address: str) -> None:
        """Send every child the address where the ranks meet."""
        for _, link in self._children:
            link.send(Rendezvous(address))

    def check(self) -> None:
        """Check that no child has failed.

        Raises:
            EngineError: see `first_failure`.
        """
        failure = self.first_failure()
        if failure is not None:
            raise failure

    def first_failure(self) -> EngineError | None:
        """Why a child has failed: the reason that it reported, or RANK_LOST. None while no child has."""
        for rank, (_, link) in enumerate(self._children, start=1):
            try:
                messages = link.receive(0)
            except LinkClosedError:
                return EngineError("RANK_LOST", f"rank {rank} has ended while starting")
            for message in messages:
                if isinstance(message, EngineFailed):
                    kind = ModelError if message.permanent else EngineError
                    return kind(message.reason, message.message)
        return None

    def close(self) -> None:
        """Kill every child."""
        for process, link in self._children:
            link.close()
            process.kill()
            process.wait()
        self._children.clear()


def start_process(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """Start a process for one rank. It inherits `theirs`, its end of the socket."""
    fd = theirs.fileno()
    # --survive-thread: the thread that creates the engine may end before the engine does.
    command = [sys.executable, "-m", "engine.processes.rank", "--survive-thread", "--fd", str(fd)]
    return subprocess.Popen(command, pass_fds=[fd])
