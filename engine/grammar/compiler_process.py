"""The process that compiles grammars.

Run by `compiler.py`: `python -m engine.grammar.compiler_process --fd N MODEL VOCABULARY [EOS...]`.
Answers requests on the inherited socket, see `compiler_protocol.py`. A grammar that needs more than
`CPU_S` seconds or `MEMORY_BYTES` ends this process, without an answer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import sys
from collections.abc import Sequence
from typing import Any

from engine.errors import ModelError
from engine.grammar.compiler_protocol import (
    COMPILED,
    READY,
    REFUSED,
    UNAVAILABLE,
    decode_grammar,
    receive,
    send,
)
from engine.grammar.json_schema import with_string_patterns
from engine.ipc.link import die_with_parent
from engine.request import Grammar

CPU_S = 20
MEMORY_BYTES = 4 << 30
# Characters between two parts of a JSON text. Without a limit, a model may generate nothing but whitespace.
_MAX_WHITESPACE = 32


def main() -> None:
    """Answer until the socket closes."""
    parser = argparse.ArgumentParser(description="Compiles grammars for an engine.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket")
    parser.add_argument("model", help="model directory")
    parser.add_argument("vocabulary", type=int, help="the model's vocabulary size")
    parser.add_argument("eos", type=int, nargs="*", help="end-of-sequence ids")
    given = parser.parse_args()
    connection = socket.socket(fileno=given.fd)
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import xgrammar

        info = _tokenizer_info(given.model, given.vocabulary, given.eos)
    except (ImportError, OSError, ModelError) as error:
        send(connection, UNAVAILABLE, str(error))
        return
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    send(connection, READY, info.serialize_json())
    os.nice(5)  # compiling must not slow down the engine's steps, which other requests wait for
    while True:
        try:
            _, text = receive(connection)
        except ConnectionError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(used.ru_utime + used.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_S, resource.RLIM_INFINITY))
        try:
            send(connection, COMPILED, _compile(compiler, decode_grammar(text)).serialize_json())
        except MemoryError:
            return
        except (RuntimeError, ValueError) as error:
            if "bad_alloc" in str(error):
                return
            send(connection, REFUSED, _explanation(error))


def _compile(compiler: Any, grammar: Grammar) -> Any:
    whitespace = {"max_whitespace_cnt": _MAX_WHITESPACE}
    match grammar.kind:
        case "json_schema":
            schema = json.dumps(with_string_patterns(json.loads(grammar.source)))
            return compiler.compile_json_schema(schema, **whitespace)
        case "json_object":
            return compiler.compile_json_schema('{"type":"object","additionalProperties":true}', **whitespace)
        case "regex":
            return compiler.compile_regex(grammar.source)
        case "choice":
            texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.source))
            return compiler.compile_grammar(f"root ::= {' | '.join(texts)}")


def _tokenizer_info(model: str, vocabulary: int, eos: Sequence[int]) -> Any:
    """The vocabulary as bytes. Special tokens become empty: a grammar must never match their names."""
    import xgrammar

    from engine.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    found = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=vocabulary, stop_token_ids=list(eos) or [vocabulary - 1]
    )
    pieces = [""] * vocabulary
    for piece, token_id in tokenizer.get_vocab().items():
        if token_id < vocabulary and token_id not in tokenizer.all_special_ids:
            pieces[token_id] = piece
    return xgrammar.TokenizerInfo(
        pieces,
        found.vocab_type,
        vocab_size=vocabulary,
        stop_token_ids=found.stop_token_ids,
        add_prefix_space=found.add_prefix_space,
    )


def _explanation(error: Exception) -> str:
    """The compiler's message without the place in its sources."""
    return str(error).strip().rpartition(".cc:")[2].partition(": ")[2] or str(error).strip()


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)
