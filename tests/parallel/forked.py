"""Engines that start fast: their ranks are forked from a process that has imported torch already."""

from __future__ import annotations

import multiprocessing
import socket
import sys
from multiprocessing.context import ForkServerProcess
from typing import Any

from engine import Engine
from engine.processes import rank as rank_process

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "engine.execution.runner",
        "engine.kernels.choose",
        "engine.weights.loader",
        "engine.distributed.channel",
        "engine.distributed.rendezvous",
        "engine.processes.rank",
    ]
)


class _Rank(ForkServerProcess):
    """A process with the methods of `subprocess.Popen` that an engine calls."""

    def wait(self) -> None:
        self.join()


class ForkedEngine(Engine):
    """An engine whose child ranks are forked instead of started."""

    def _start_process(self, theirs: socket.socket) -> Any:
        process = _Rank(target=_serve, args=(theirs,), daemon=True)
        process.start()
        return process


def _serve(ours: socket.socket) -> None:
    sys.argv = ["rank", "--survive-thread", "--fd", str(ours.detach())]
    rank_process.main()
