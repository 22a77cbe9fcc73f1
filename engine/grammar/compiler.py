"""The engine's side of the compiler process.

Imports xgrammar when the first grammar comes: the import takes about a second, and many engines never get a
grammar.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from engine.errors import RequestError
from engine.grammar.compiler_process import CPU_S
from engine.grammar.compiler_protocol import COMPILE, COMPILED, READY, REFUSED, encode_grammar, receive, send
from engine.grammar.validation import invalid_grammar
from engine.request import Grammar

_TIMEOUT_S = 120.0  # more than CPU_S: other processes may slow the compiler process down
_MAX_COMPILED_TEXT = 64 << 20


class GrammarCompiler:
    """Compiles grammars in a process, and starts a new process after a grammar that was too much for it.

    Owns: the process and the socket to it. Its methods block. All but `abort` belong to one thread, which
    must outlive the process.
    """

    def __init__(self, model: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._arguments = [model, str(vocab_size), *map(str, eos_token_ids)]
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._tokenizer_info: Any = None
        self._aborted = False

    def compile(self, grammar: Grammar) -> Any:
        """The compiled grammar, for matchers.

        Raises:
            RequestError: INVALID_GRAMMAR, GRAMMAR_TOO_COMPLEX, GRAMMAR_UNAVAILABLE.
        """
        try:
            import xgrammar
        except (ImportError, OSError) as error:
            raise _unavailable(str(error)) from error
        connection = self._connect()
        try:
            send(connection, COMPILE, encode_grammar(grammar))
            tag, text = receive(connection)
        except (ConnectionError, TimeoutError) as error:
            self.close()
            raise _too_complex() from error
        if tag == REFUSED:
            raise invalid_grammar(grammar, text)
        assert tag == COMPILED
        if len(text) > _MAX_COMPILED_TEXT:
            raise _too_complex()
        return xgrammar.CompiledGrammar.deserialize_json(text, self._tokenizer_info)

    def abort(self) -> None:
        """From another thread: make `compile` fail soon, now and later."""
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
        """The socket to the process. Starts the process if there is none, and waits until it is ready."""
        if self._connection is not None:
            return self._connection
        import xgrammar

        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "engine.grammar.compiler_process", "--fd", str(theirs.fileno())]
            self._process = subprocess.Popen([*command, *self._arguments], pass_fds=[theirs.fileno()])
        if self._aborted:
            self._process.kill()
        ours.settimeout(_TIMEOUT_S)
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


def _unavailable(why: str) -> RequestError:
    return RequestError("GRAMMAR_UNAVAILABLE", f"this engine cannot follow grammars: {why}")


def _too_complex() -> RequestError:
    return RequestError(
        "GRAMMAR_TOO_COMPLEX", f"the grammar takes more than {CPU_S} s or too much memory to compile"
    )
