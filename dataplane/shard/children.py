"""A worker's running children: the engine and, on the leader, the text process.

Owns: the processes, by number; the socket between the two. Does not own: when each should live
(`supervisor`), whether one hangs (`monitor`), the meaning of messages (`worker`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from dataplane.shard.events import Event, Exited, Spawned, SpawnEngine, SpawnText
from dataplane.shard.launch import ForkServer, spawn
from dataplane.shard.process import Child, TextChild
from engine.ipc.wire import Message

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Commands:
    """How children are started. Options that name sockets are appended.

    Engines are forked if `forkserver` is set.
    """

    engine: tuple[str, ...] = (sys.executable, "-m", "engine.processes.rank")
    text: tuple[str, ...] = (sys.executable, "-m", "engine.text.process")
    forkserver: tuple[str, ...] = ()


class Children:
    """Starts children, talks to them and reports their ends.

    Args:
        commands: what to run.
        start_task: runs a coroutine for as long as the worker runs.
        handle: is called with `Spawned` and `Exited`.
        received: is called with the number of a child and each message of it.
    """

    def __init__(
        self,
        commands: Commands,
        *,
        start_task: Callable[[Coroutine[Any, Any, None]], object],
        handle: Callable[[Event], None],
        received: Callable[[int, Message], None],
    ) -> None:
        self._commands = commands
        self._start_task, self._handle, self._on_received = start_task, handle, received
        self._children: dict[int, Child] = {}
        self._texts: dict[int, TextChild] = {}
        self.forkserver = ForkServer(commands.forkserver) if commands.forkserver else None

    def spawn_engine(self, instruction: SpawnEngine) -> None:
        """Start an engine; rank 0 gets a socket to its text process."""
        sockets = {}
        if instruction.text in self._texts:
            sockets["--text-fd"] = self._texts[instruction.text].connect(instruction.child)
        child = Child(
            self._commands.engine,
            instruction.start,
            launch=spawn if self.forkserver is None else self.forkserver.launch,
            sockets=sockets,
            on_spawned=lambda pid: self._handle(Spawned(instruction.child, pid)),
            on_message=lambda message: self._on_received(instruction.child, message),
        )
        self._run(instruction.child, child)

    def spawn_text(self, instruction: SpawnText) -> None:
        """Start a text process."""
        child = self._texts[instruction.child] = TextChild(
            self._commands.text,
            instruction.start,
            on_spawned=lambda pid: self._handle(Spawned(instruction.child, pid)),
            on_message=lambda message: self._on_received(instruction.child, message),
        )
        self._run(instruction.child, child)

    def kill(self, number: int) -> None:
        """End a child now, or as soon as it has started. Idempotent."""
        if number in self._children:
            self._children[number].kill()

    def send(self, number: int, message: Message) -> None:
        """Send to a child; a message to a child that has ended is lost."""
        if number in self._children:
            self._children[number].send(message)

    def _run(self, number: int, child: Child) -> None:
        self._children[number] = child
        self._start_task(self._attend(number, child))

    async def _attend(self, number: int, child: Child) -> None:
        status = await child.run()
        del self._children[number]
        self._texts.pop(number, None)
        log.info("child ended", extra={"child": number, "status": status})
        self._handle(Exited(number, status))
