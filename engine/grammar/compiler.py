"""This process's side of compiling grammars, and matchers over what was compiled.

The library behind it, xgrammar, is imported when the first grammar comes: it costs about a second, and
an engine that no grammar is asked of does without it.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from engine.errors import RequestError
from engine.grammar.process import COMPILE, COMPILED, CPU_S, READY, REFUSED, pack, receive, send
from engine.grammar.source import invalid
from engine.request import FinishReason, Grammar

_PATIENCE_S = 120.0  # for CPU_S of a process that others may hold up
_MOST_COMPILED_TEXT = 64 << 20


class Compiler:
    """The process that compiles, begun anew when a grammar was too much for the last one.

    Methods block; they belong to one thread that outlives the process.
    """

    def __init__(self, model: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._arguments = [model, str(vocab_size), *map(str, eos_token_ids)]
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._tokenizer_info: Any = None
        self._aborted = False

    def compile(self, grammar: Grammar) -> Any:
        """What matchers need of a grammar.

        Raises:
            RequestError: INVALID_GRAMMAR, GRAMMAR_TOO_COMPLEX, GRAMMAR_UNAVAILABLE.
        """
        try:
            import xgrammar
        except (ImportError, OSError) as error:
            raise _unavailable(str(error)) from error
        connection = self._connect()
        try:
            send(connection, COMPILE, pack(grammar))
            tag, text = receive(connection)
        except (ConnectionError, TimeoutError) as error:
            self.close()
            raise _too_complex() from error
        if tag == REFUSED:
            raise invalid(grammar, text)
        assert tag == COMPILED
        if len(text) > _MOST_COMPILED_TEXT:
            raise _too_complex()
        return xgrammar.CompiledGrammar.deserialize_json(text, self._tokenizer_info)

    def abort(self) -> None:
        """From another thread: have `compile` give up soon, for good."""
        self._aborted = True
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _connect(self) -> socket.socket:
        """The process's socket, once it has loaded its tokeniser."""
        if self._connection is not None:
            return self._connection
        import xgrammar

        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "engine.grammar.process", "--fd", str(theirs.fileno())]
            self._process = subprocess.Popen([*command, *self._arguments], pass_fds=[theirs.fileno()])
        if self._aborted:
            self._process.kill()
        ours.settimeout(_PATIENCE_S)
        self._connection = ours
        try:
            tag, text = receive(ours)
        except (ConnectionError, TimeoutError) as error:
            self.close()
            raise _unavailable("the process that compiles them does not start") from error
        if tag != READY:
            self.close()
            raise _unavailable(text)
        self._tokenizer_info = xgrammar.TokenizerInfo.deserialize_json(text)
        return ours


class XMatcher:
    """A `grammar.Matcher` that stands after `output`.

    Args:
        compiled: by `Compiler`.
        stops: token ids that end the output, allowed only where the grammar may end.
        vocab_size: of the model.
        output: what there is already.

    Raises:
        RequestError: INVALID_GRAMMAR, when the output does not follow the grammar, or nothing can.
    """

    def __init__(self, compiled: Any, stops: Sequence[int], vocab_size: int, output: Sequence[int]) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=list(stops))
        self._mask_1W = xgrammar.allocate_token_bitmask(1, vocab_size)
        self.finish: FinishReason | None = None
        for token_id in output:
            if not self._matcher.accept_token(token_id):
                raise RequestError("INVALID_GRAMMAR", "the prior output does not follow the grammar")
        self._look()
        if self.finish == "length" and not output:
            raise RequestError("INVALID_GRAMMAR", "no text of the model's tokens follows the grammar")

    def accept(self, token_id: int) -> None:
        """Take in the next token of the output."""
        if not self._matcher.accept_token(token_id):
            raise AssertionError(f"token {token_id} was drawn although the grammar does not allow it")
        self._look()

    def mask(self) -> bytes:
        """The tokens allowed next, as `plan.Mask` has them."""
        return bytes(self._mask_1W.numpy())

    def _look(self) -> None:
        """See what may come next. An output that can neither end nor go on is cut off."""
        if self._matcher.is_terminated():
            self.finish = "stop"
            return
        self._matcher.fill_next_token_bitmask(self._mask_1W)
        if not self._mask_1W.any():
            self.finish = "length"


def _unavailable(why: str) -> RequestError:
    return RequestError("GRAMMAR_UNAVAILABLE", f"this engine cannot follow grammars: {why}")


def _too_complex() -> RequestError:
    return RequestError(
        "GRAMMAR_TOO_COMPLEX", f"the grammar takes more than {CPU_S} s or too much memory to compile"
    )
