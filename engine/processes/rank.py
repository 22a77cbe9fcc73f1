"""Entry point of one rank: `python -m engine.processes.rank --fd N [--text-fd M]`, N and M inherited sockets.

Rank 0 serves requests; every other rank executes plans. N carries `engine.ipc.wire` messages; when it closes,
the process ends at once. Rank 0 writes its steps to the text process over M, or over N where there is no M.
"""

from __future__ import annotations

import argparse
import dataclasses
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

from engine.config import EngineConfig
from engine.errors import EngineError, ModelError, RequestError, as_engine_error
from engine.grammar.gate import Gate
from engine.ipc.link import Link, LinkClosedError, die_with_parent
from engine.ipc.sender import BufferedSender
from engine.ipc.wire import (
    Alive,
    Began,
    CancelRequest,
    EngineFailed,
    EngineReady,
    Loading,
    Message,
    Probe,
    Rendezvous,
    StartEngine,
    Step,
    StepEnded,
    SubmitRequest,
)
from engine.processes.startup import Member, join
from engine.request import Delta, Refusal
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
        help="outlive the thread that started this process: only the closed socket ends it",
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
        link.beat()  # a worker listens; an offline engine does not read any more once its ranks are ready
    code = 0
    with ExitStack() as at_end:
        try:
            _run(link, steps, at_end)
        except LinkClosedError:
            pass  # nobody is left to tell
        except Exception as error:
            code = 1
            if isinstance(error, EngineError) and error.reason != "INTERNAL":
                sys.stderr.write(f"engine: {error.message}\n")
            else:
                traceback.print_exc(file=sys.stderr)
            _last_word(link, error)  # before other ranks call this one lost: the first reason is kept
    sys.stderr.flush()
    # Threads of a communicator whose peer has gone may never end.
    os._exit(code)


def _run(link: Link, steps: Link | BufferedSender, at_end: ExitStack) -> None:
    start, *early = link.receive()
    if not isinstance(start, StartEngine):
        raise EngineError("INTERNAL", f"expected StartEngine, got {type(start).__name__}")
    engine = EngineConfig(**dataclasses.asdict(start))
    member = join(
        engine,
        announce=lambda address: link.send(Rendezvous(address)),
        meet=lambda: _meet(link, early),
        progress=lambda fraction: link.send(Loading(fraction)),
    )
    at_end.callback(member.parallel.leave)
    gc.freeze()  # what is there now stays: a collection under load need not look at it
    config, identity = member.config, engine_identity(engine, member.config)
    step_s = 0.0 if member.core is None else _timed_canary(member.core)
    link.send(EngineReady(identity, member.max_model_len, config.vocab_size, config.eos_token_ids, step_s))
    if member.core is not None:
        _lead(member.core, link, steps, early)
    else:
        _follow(member, link)


def _timed_canary(core: EngineCore) -> float:
    """How long a small step of the whole group takes, in seconds."""
    began = time.monotonic()
    core.canary(time.time())
    return time.monotonic() - began


def _meet(link: Link, early: list[Message]) -> str:
    """The group's address, which may have come with the first message."""
    for message in chain(early, _messages(link)):
        if isinstance(message, Rendezvous):
            return message.address
    raise LinkClosedError


def _messages(link: Link) -> Iterable[Message]:
    while True:
        yield from link.receive()


def _lead(core: EngineCore, link: Link, steps: Link | BufferedSender, early: list[Message]) -> None:
    """Serve: one `Step` for what has arrived, one for each step that has run."""
    step, told = 0, core.load
    gate = Gate(core.grammars, link)
    messages: Iterable[Message] = early
    while True:
        accepted, failed, finished, probed = _take(core, gate.passing(messages))
        if accepted or failed or finished or core.load != told:
            told = core.load
            steps.send(Step(step, told, accepted, finished, failed))
        if probed:
            if not core.busy:
                core.canary(time.time())
            link.send(Alive())
        if core.busy:
            core.launch(time.time(), lambda tokens: link.send(Began(tokens)))
            step, deltas = core.collect(time.time())
            told = core.load
            link.send(StepEnded())  # for the watchdog, whatever the text process does
            steps.send(Step(step, told, deltas=deltas))
        if not core.busy:
            core.wait(gate)
        messages = link.receive(0)


def _take(
    core: EngineCore, messages: Iterable[Message]
) -> tuple[tuple[str, ...], tuple[Refusal, ...], tuple[Delta, ...], bool]:
    """Apply commands: requests accepted, refused, choices that ended at once, and whether one is a probe."""
    accepted: list[str] = []
    failed: list[Refusal] = []
    finished: list[Delta] = []
    probed = False
    for message in messages:
        match message:
            case SubmitRequest(request):
                try:
                    finished.extend(core.submit(request, time.time()))
                    accepted.append(request.id)
                except RequestError as error:
                    failed.append(Refusal(request.id, error.reason, error.message))
            case CancelRequest(request_id, choice):
                core.cancel(request_id, choice)
            case Probe():
                probed = True
            case _:
                raise EngineError("INTERNAL", f"unexpected {type(message).__name__}")
    return tuple(accepted), tuple(failed), tuple(finished), probed


def _follow(member: Member, link: Link) -> None:
    """Execute plans until the leader or the parent has gone."""
    assert member.plans is not None
    while True:
        plan = member.plans.receive(beside=[link])
        if plan is None:
            link.receive()  # raises LinkClosedError: the parent has nothing to say
            continue
        drawn = member.runner.run(plan)
        if drawn is not None:
            member.plans.send(drawn())


def _last_word(link: Link, error: Exception) -> None:
    known = as_engine_error(error)
    try:
        link.send(EngineFailed(known.reason, known.message, permanent=isinstance(known, ModelError)))
    except LinkClosedError:
        sys.stderr.write("engine: the parent has gone before it could be told\n")


if __name__ == "__main__":
    main()
