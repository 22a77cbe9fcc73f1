"""Rank 0's loop: commands from the worker in, `Step`s to the text process out. core.py describes a step."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.errors import EngineError, RequestError
from engine.grammar.grammar_queue import GrammarQueue
from engine.ipc.link import Link
from engine.ipc.sender import BufferedSender
from engine.ipc.wire import Alive, Began, CancelRequest, Message, Probe, Step, StepEnded, SubmitRequest
from engine.request import Delta, Refusal

if TYPE_CHECKING:
    from engine.processes.core import EngineCore  # imports torch


@dataclass(slots=True)
class _Outcome:
    """The results of the commands between two steps.

    `finished` has the ends of choices whose prior output was complete already.
    """

    accepted: list[str] = field(default_factory=list)
    failed: list[Refusal] = field(default_factory=list)
    finished: list[Delta] = field(default_factory=list)
    probed: bool = False


def serve(core: EngineCore, link: Link, steps: Link | BufferedSender, early: list[Message]) -> None:
    """Serve until the worker closes its link.

    Args:
        core: runs the steps.
        link: to the worker.
        steps: takes one `Step` per step, and one more for the commands between two steps if they changed
            anything. Leads to the text process.
        early: messages that arrived together with `StartEngine`.

    Raises:
        LinkClosedError: the worker has closed the link.
        EngineError: another rank has ended, or a bug.
    """
    step, sent_load = 0, core.load
    queue = GrammarQueue(core.grammars, link)
    messages: Iterable[Message] = early
    while True:
        outcome = _handle_commands(core, queue.admit(messages))
        if outcome.accepted or outcome.failed or outcome.finished or core.load != sent_load:
            sent_load = core.load
            steps.send(
                Step(
                    step,
                    sent_load,
                    tuple(outcome.accepted),
                    tuple(outcome.finished),
                    tuple(outcome.failed),
                )
            )
        if outcome.probed:
            if not core.busy:
                core.canary(time.time())
            link.send(Alive())
        if core.busy:
            core.launch(time.time(), lambda tokens: link.send(Began(tokens)))
            step, deltas = core.collect(time.time())
            sent_load = core.load
            # Not by way of the text process, which may hang: the worker's watchdog would blame this engine.
            link.send(StepEnded())
            steps.send(Step(step, sent_load, deltas=deltas))
        if not core.busy:
            core.wait(queue)
        messages = link.receive(0)


def _handle_commands(core: EngineCore, messages: Iterable[Message]) -> _Outcome:
    outcome = _Outcome()
    for message in messages:
        match message:
            case SubmitRequest(request):
                try:
                    outcome.finished.extend(core.submit(request, time.time()))
                    outcome.accepted.append(request.id)
                except RequestError as error:
                    outcome.failed.append(Refusal(request.id, error.reason, error.message))
            case CancelRequest(request_id, choice):
                core.cancel(request_id, choice)
            case Probe():
                outcome.probed = True
            case _:
                raise EngineError("INTERNAL", f"unexpected {type(message).__name__}")
    return outcome
