"""The process that compiles grammars: `python -m engine.grammar.process --fd N MODEL VOCABULARY [EOS...]`.

Over the inherited socket go frames: a 4-byte big-endian length, a tag of one byte, UTF-8 text. It first
sends its tokeniser's description, then answers each grammar with what was compiled or why it was not.
A grammar that costs more than `CPU_S` or `MEMORY_BYTES` ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any

from engine.errors import ModelError
from engine.grammar.json_schema import legal_strings
from engine.ipc.link import die_with_parent
from engine.request import Grammar, GrammarKind

CPU_S = 20
MEMORY_BYTES = 4 << 30
_MOST_WHITESPACE = 32  # characters between two parts of a JSON text, lest an output be nothing but them

READY, COMPILE, COMPILED, REFUSED, UNAVAILABLE = b"I", b"G", b"C", b"R", b"U"
_HEAD = struct.Struct(">Ic")
_KINDS: dict[bytes, GrammarKind] = {b"s": "json_schema", b"o": "json_object", b"r": "regex", b"c": "choice"}


def send(connection: socket.socket, tag: bytes, text: str) -> None:
    """Send one frame."""
    data = text.encode()
    connection.sendall(_HEAD.pack(len(data), tag) + data)


def receive(connection: socket.socket) -> tuple[bytes, str]:
    """The next frame. Raises ConnectionError when the other side has gone, TimeoutError on its timeout."""
    length, tag = _HEAD.unpack(_exactly(connection, _HEAD.size))
    return tag, str(_exactly(connection, length), "utf-8")


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionResetError("the other side has gone")
        view = view[count:]
    return data


def pack(grammar: Grammar) -> str:
    """A grammar as a frame's text."""
    return json.dumps([grammar.kind, grammar.source])


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
    os.nice(5)  # from now on what a client wants done is done beside steps that others wait for
    while True:
        try:
            _, text = receive(connection)
        except ConnectionError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(used.ru_utime + used.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_S, resource.RLIM_INFINITY))
        try:
            send(connection, COMPILED, _compile(compiler, Grammar(*json.loads(text))).serialize_json())
        except MemoryError:
            return
        except (RuntimeError, ValueError) as error:
            if "bad_alloc" in str(error):
                return
            send(connection, REFUSED, _explanation(error))


def _compile(compiler: Any, grammar: Grammar) -> Any:
    whitespace = {"max_whitespace_cnt": _MOST_WHITESPACE}
    match grammar.kind:
        case "json_schema":
            schema = json.dumps(legal_strings(json.loads(grammar.source)))
            return compiler.compile_json_schema(schema, **whitespace)
        case "json_object":
            return compiler.compile_json_schema('{"type":"object","additionalProperties":true}', **whitespace)
        case "regex":
            return compiler.compile_regex(grammar.source)
        case "choice":
            texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.source))
            return compiler.compile_grammar(f"root ::= {' | '.join(texts)}")


def _tokenizer_info(model: str, vocabulary: int, eos: Sequence[int]) -> Any:
    """The vocabulary as bytes. Special tokens stand for no text: what they look like must never match."""
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
    """What the compiler said, without where in its sources."""
    return str(error).strip().rpartition(".cc:")[2].partition(": ")[2] or str(error).strip()


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):
        sys.exit(1)
