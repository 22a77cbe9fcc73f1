"""The grammars of an engine: compiles them beside the engine's steps, and caches them.

Compiling may take seconds, so it happens in a process of its own (`compiler_process.py`), which a thread
talks to. A limit of that process's time and memory ends it at a grammar that is too expensive. A grammar that
crashes the compiler crashes nothing else.

Only the leader follows outputs through grammars. The other ranks get token masks with their plans. So a
preemption changes nothing here, and a replay gives the prior output to a new matcher.
"""

from __future__ import annotations

import select
import socket
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from engine.errors import RequestError
from engine.grammar.matcher import MakeMatcher
from engine.grammar.validation import check_grammar, invalid_grammar
from engine.request import Grammar, Request

if TYPE_CHECKING:
    from engine.grammar.compiler import GrammarCompiler

_MAX_CACHED = 256
_MAX_CACHED_BYTES = 512 << 20


class GrammarService:
    """All grammars of one engine. Its methods belong to one thread, the engine's.

    Owns: the thread that compiles, and the cache of its results: compiled grammars and refusals.
    Does not own: requests, and the order of steps.

    Args:
        model: the model's directory, for its tokeniser.
        vocab_size: the model's.
        eos_token_ids: tokens that end an output, beside a request's own stop ids.
    """

    def __init__(self, model: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._model, self._vocab_size, self._eos = model, vocab_size, tuple(eos_token_ids)
        # A verdict is a compiled grammar or a RequestError. Least recently used first.
        self._verdicts: OrderedDict[Grammar, Any] = OrderedDict()
        self._compiling: set[Grammar] = set()
        self._jobs: SimpleQueue[Grammar | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[Grammar, Any]] = SimpleQueue()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._thread: threading.Thread | None = None
        self._compiler: GrammarCompiler | None = None  # belongs to the thread, except for its `abort`
        self._closed = False

    def fileno(self) -> int:
        """Readable when a grammar has been compiled or refused."""
        return self._wake_receiver.fileno()

    def ready(self, grammar: Grammar) -> bool:
        """Whether `follow` would return at once. If not, this starts to compile the grammar."""
        self._collect()
        if grammar in self._verdicts:
            return True
        if grammar not in self._compiling:
            try:
                check_grammar(grammar)
            except RequestError:
                return True  # `follow` raises it again: a refusal that costs no compiler needs no cache
            self._compiling.add(grammar)
            self._jobs.put(grammar)
            if self._thread is None:
                self._thread = threading.Thread(target=self._compile_all, name="grammars", daemon=True)
                self._thread.start()
        return False

    def follow(self, request: Request) -> MakeMatcher | None:
        """A maker of matchers for the request's grammar; None without a grammar. Waits for the compiler.

        Raises:
            RequestError: INVALID_GRAMMAR, GRAMMAR_TOO_COMPLEX, GRAMMAR_UNAVAILABLE, INTERNAL.
        """
        grammar = request.sampling.grammar
        if grammar is None:
            return None
        while not self.ready(grammar):
            select.select([self], [], [])
        if grammar not in self._verdicts:
            check_grammar(grammar)
        self._verdicts.move_to_end(grammar)
        compiled = self._verdicts[grammar]
        if isinstance(compiled, RequestError):
            if compiled.reason in ("GRAMMAR_UNAVAILABLE", "INTERNAL"):
                del self._verdicts[grammar]  # the next request tries again: the cause may have gone
            raise RequestError(compiled.reason, compiled.message)
        stop_token_ids = sorted({*self._eos, *request.stop_token_ids})
        if not stop_token_ids:
            raise invalid_grammar(grammar, "the model has no end of sequence; name a stop token id")
        from engine.grammar.xgrammar_matcher import XgrammarMatcher

        return lambda output: XgrammarMatcher(compiled, stop_token_ids, self._vocab_size, output)

    def close(self) -> None:
        """End the thread and the process that compiles."""
        self._closed = True
        self._jobs.put(None)
        if self._compiler is not None:
            self._compiler.abort()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._wake_receiver.close()
        self._wake_sender.close()

    def _collect(self) -> None:
        """Take the thread's verdicts into the cache, and evict old ones."""
        try:
            while self._wake_receiver.recv(1024):
                pass
        except BlockingIOError:
            pass
        while not self._done.empty():
            grammar, verdict = self._done.get()
            self._compiling.discard(grammar)
            self._verdicts[grammar] = verdict
            while len(self._verdicts) > 1 and (
                len(self._verdicts) > _MAX_CACHED or self._cached_bytes() > _MAX_CACHED_BYTES
            ):
                self._verdicts.popitem(last=False)

    def _cached_bytes(self) -> int:
        return sum(getattr(verdict, "memory_size_bytes", 0) for verdict in self._verdicts.values())

    def _compile_all(self) -> None:
        """The thread: compile one grammar after the other until `close`."""
        while (grammar := self._jobs.get()) is not None and not self._closed:
            verdict: Any
            try:
                if self._compiler is None:
                    from engine.grammar.compiler import GrammarCompiler

                    self._compiler = GrammarCompiler(self._model, self._vocab_size, self._eos)
                verdict = self._compiler.compile(grammar)
            except RequestError as error:
                verdict = error
            except Exception as error:  # without a verdict, requests with this grammar would wait for ever
                traceback.print_exc(file=sys.stderr)
                why = f"the grammar could not be compiled: {type(error).__name__}"
                verdict = RequestError("INTERNAL", why)
            self._done.put((grammar, verdict))
            self._wake_sender.send(b"\0")
        if self._compiler is not None:
            self._compiler.close()
