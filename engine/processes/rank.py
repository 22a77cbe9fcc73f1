"""Entry point of one rank: `python -m engine.processes.rank --fd N [--text-fd M]`, N and M inherited sockets.

Rank 0 serves requests (processes/serve.py); every other rank runs rank 0's plans. N carries the messages of
ipc/wire.py. The process ends as soon as N is closed. M leads to the text process: rank 0 writes its steps
there, or to N if there is no M.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING

from engine.errors import EngineError, ModelError, as_engine_error
from engine.ipc.link import Link, LinkClosedError, die_with_parent
from engine.ipc.sender import BufferedSender
from engine.ipc.wire import EngineFailed, EngineReady, Loading, Message, Rendezvous, StartEngine
from engine.processes.serve import serve
from engine.processes.startup import StartedRank, start_rank
from engine.weights.identity import engine_identity

if TYPE_CHECKING:
    from engine.processes.core import EngineCore  # imports torch


def main() -> None:
    """Run a rank until its socket closes."""
    parser = argparse.ArgumentParser(description="One rank of an engine.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket")
    parser.add_argument("--text-fd", type=int, help="inherited socket to the text process")
    parser.add_argument(
        "--survive-thread",
        action="store_true",
        help="outlive the thread that started this process; only the closed socket ends it",
    )
    arguments = parser.parse_args()
    run(arguments.fd, arguments.text_fd, survive_thread=arguments.survive_thread)


def run(fd: int, text_fd: int | None, *, survive_thread: bool) -> None:
    """Run a rank until the socket `fd` closes; never returns."""
    logging.basicConfig(level=logging.INFO, format="engine: %(message)s", stream=sys.stderr)
    link = Link.inherited(fd)
    steps = link if text_fd is None else BufferedSender(socket.socket(fileno=text_fd))
    if not survive_thread:
        die_with_parent()
        link.beat()  # for a worker; an offline engine stops reading once its ranks are ready
    code = 0
    with ExitStack() as at_end:
        try:
            _run(link, steps, at_end)
        except LinkClosedError:
            pass  # the parent has gone: there is no one to report to
        except Exception as error:
            code = 1
            if isinstance(error, EngineError) and error.reason != "INTERNAL":
                sys.stderr.write(f"engine: {error.message}\n")
            else:
                traceback.print_exc(file=sys.stderr)
            # Report before the exit, which makes the other ranks report RANK_LOST: the first reason counts.
            _report_failure(link, error)
    sys.stderr.flush()
    # Not sys.exit: it waits for threads, and a communicator's thread may never end once its peer has gone.
    os._exit(code)


def _run(link: Link, steps: Link | BufferedSender, at_end: ExitStack) -> None:
    start, *early = link.receive()
    if not isinstance(start, StartEngine):
        raise EngineError("INTERNAL", f"expected StartEngine, got {type(start).__name__}")
    rank = start_rank(
        start.config,
        announce=lambda address: link.send(Rendezvous(address)),
        meet=lambda: _meet(link, early),
        progress=lambda fraction: link.send(Loading(fraction)),
    )
    at_end.callback(rank.parallel.leave)
    gc.freeze()  # no later garbage collection visits the many objects of the startup
    config, identity = rank.config, engine_identity(start.config, rank.config)
    step_s = 0.0 if rank.core is None else _timed_canary(rank.core)
    link.send(EngineReady(identity, rank.max_model_len, config.vocab_size, config.eos_token_ids, step_s))
    if rank.core is not None:
        serve(rank.core, link, steps, early)
    else:
        _run_plans(rank, link)


def _timed_canary(core: EngineCore) -> float:
    """Seconds that a small step of all ranks takes."""
    began = time.monotonic()
    core.canary(time.time())
    return time.monotonic() - began


def _meet(link: Link, early: list[Message]) -> str:
    """Wait for the address where the ranks meet. It may have arrived together with the first message."""
    for message in chain(early, _messages(link)):
        if isinstance(message, Rendezvous):
            return message.address
    raise LinkClosedError


def _messages(link: Link) -> Iterable[Message]:
    while True:
        yield from link.receive()


def _run_plans(rank: StartedRank, link: Link) -> None:
    """Run plans until rank 0 or the parent has gone. The sampling rank sends the sampled tokens back."""
    assert rank.plans is not None
    while True:
        plan = rank.plans.receive(beside=[link])
        if plan is None:
            link.receive()  # raises LinkClosedError: the parent sends nothing more, so readable means closed
            continue
        pending = rank.runner.run(plan)
        if pending is not None:
            rank.plans.send(pending())


def _report_failure(link: Link, error: Exception) -> None:
    known = as_engine_error(error)
    try:
        link.send(EngineFailed(known.reason, known.message, permanent=isinstance(known, ModelError)))
    except LinkClosedError:
        sys.stderr.write("engine: the failure cannot be reported, because the parent has gone\n")


if __name__ == "__main__":
    main()
