"""Grammars that outputs follow: who compiles them, and how far each output has come.

Owns: the process that compiles (`engine.grammar.process`), what it has compiled.
Does not own: requests, or the order of steps.

Compiling may take seconds, so it happens beside the engine's steps, in a process of its own: an expensive
grammar is given up by ending the process, and one that crashes the compiler takes nothing else with it.
Only the leader follows outputs; ranks get masks with their plans. So a preemption changes nothing, and a
replay sample_on_device the prior output to a new matcher.
"""

from __future__ import annotations

import select
import socket
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import RequestError
from engine.grammar.source import check, invalid
from engine.request import FinishReason, Grammar, Request

if TYPE_CHECKING:
    from engine.grammar.compiler import Compiler

_MOST_COMPILED = 256
_MOST_COMPILED_BYTES = 512 << 20


class Matcher(Protocol):
    """Follows one output through its grammar."""

    @property
    def finish(self) -> FinishReason | None:
        """Set once nothing may follow: "stop" where the grammar has been matched to its end."""

    def accept(self, token_id: int) -> None:
        """Take in the next token of the output."""

    def mask(self) -> bytes:
        """The tokens allowed next, as `plan.Mask` has them."""


Follow = Callable[[Sequence[int]], Matcher]
"""A matcher that stands after some output. Raises RequestError when the grammar does not allow it."""


class Grammars:
    """All grammars of one engine. Its methods belong to one thread, the engine's.

    Args:
        model: the model's directory, for its tokeniser.
        vocab_size: of the model.
        eos_token_ids: that end an output, beside a request's own stop ids.
    """

    def __init__(self, model: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._model, self._vocab_size, self._eos = model, vocab_size, tuple(eos_token_ids)
        self._verdicts: OrderedDict[Grammar, Any] = OrderedDict()  # compiled, or why not
        self._pending: set[Grammar] = set()
        self._jobs: SimpleQueue[Grammar | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[Grammar, Any]] = SimpleQueue()
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._thread: threading.Thread | None = None
        self._compiler: Compiler | None = None  # the thread's, but for its `abort`
        self._closed = False

    def fileno(self) -> int:
        """Readable when a grammar has been compiled or refused."""
        return self._woken.fileno()

    def ready(self, grammar: Grammar) -> bool:
        """Whether `follow` would answer at once; if not, compiling begins."""
        self._collect()
        if grammar in self._verdicts:
            return True
        if grammar not in self._pending:
            try:
                check(grammar)
            except RequestError as error:
                self._verdicts[grammar] = error
                return True
            self._pending.add(grammar)
            self._jobs.put(grammar)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="grammars", daemon=True)
                self._thread.start()
        return False

    def follow(self, request: Request) -> Follow | None:
        """How to follow the request's grammar; None without one. Waits while it is being compiled.

        Raises:
            RequestError: INVALID_GRAMMAR, GRAMMAR_TOO_COMPLEX, GRAMMAR_UNAVAILABLE, INTERNAL.
        """
        grammar = request.sampling.grammar
        if grammar is None:
            return None
        while not self.ready(grammar):
            select.select([self], [], [])
        self._verdicts.move_to_end(grammar)
        compiled = self._verdicts[grammar]
        if isinstance(compiled, RequestError):
            if compiled.reason in ("GRAMMAR_UNAVAILABLE", "INTERNAL"):
                del self._verdicts[grammar]  # of the moment, perhaps
            raise RequestError(compiled.reason, compiled.message)
        stops = sorted({*self._eos, *request.stop_token_ids})
        if not stops:
            raise invalid(grammar, "the model has no end of sequence; name a stop token id")
        from engine.grammar.compiler import XMatcher

        return lambda output: XMatcher(compiled, stops, self._vocab_size, output)

    def close(self) -> None:
        """End the process that compiles."""
        self._closed = True
        self._jobs.put(None)
        if self._compiler is not None:
            self._compiler.abort()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._woken.close()
        self._wake.close()

    def _collect(self) -> None:
        try:
            while self._woken.recv(1024):
                pass
        except BlockingIOError:
            pass
        while not self._done.empty():
            grammar, verdict = self._done.get()
            self._pending.discard(grammar)
            self._verdicts[grammar] = verdict
            while len(self._verdicts) > 1 and (
                len(self._verdicts) > _MOST_COMPILED or self._bytes() > _MOST_COMPILED_BYTES
            ):
                self._verdicts.popitem(last=False)

    def _bytes(self) -> int:
        return sum(getattr(verdict, "memory_size_bytes", 0) for verdict in self._verdicts.values())

    def _work(self) -> None:
        """The thread: one grammar after the other."""
        while (grammar := self._jobs.get()) is not None and not self._closed:
            verdict: Any
            try:
                if self._compiler is None:
                    from engine.grammar.compiler import Compiler

                    self._compiler = Compiler(self._model, self._vocab_size, self._eos)
                verdict = self._compiler.compile(grammar)
            except RequestError as error:
                verdict = error
            except Exception as error:  # or whoever waits for it would wait for ever
                traceback.print_exc(file=sys.stderr)
                why = f"the grammar could not be compiled: {type(error).__name__}"
                verdict = RequestError("INTERNAL", why)
            self._done.put((grammar, verdict))
            self._wake.send(b"\0")
        if self._compiler is not None:
            self._compiler.close()
