"""The messages between an engine and its compiler process, over a socket.

A frame is a 4-byte big-endian length, a tag of one byte, and UTF-8 text. The process first sends READY
with its tokeniser's description, or UNAVAILABLE with a reason. Then it answers each COMPILE, whose text
is a grammar, with COMPILED and the compiled grammar, or with REFUSED and a reason.
"""

from __future__ import annotations

import json
import socket
import struct

from engine.request import Grammar

READY, COMPILE, COMPILED, REFUSED, UNAVAILABLE = b"I", b"G", b"C", b"R", b"U"
_HEAD = struct.Struct(">Ic")


def send(connection: socket.socket, tag: bytes, text: str) -> None:
    """Send one frame."""
    data = text.encode()
    connection.sendall(_HEAD.pack(len(data), tag) + data)


def receive(connection: socket.socket) -> tuple[bytes, str]:
    """The next frame. Raises ConnectionError when the other side has gone, TimeoutError if it is too slow."""
    length, tag = _HEAD.unpack(_receive_exactly(connection, _HEAD.size))
    return tag, str(_receive_exactly(connection, length), "utf-8")


def encode_grammar(grammar: Grammar) -> str:
    """The text of a COMPILE frame."""
    return json.dumps([grammar.kind, grammar.source])


def decode_grammar(text: str) -> Grammar:
    """The grammar in a COMPILE frame."""
    return Grammar(*json.loads(text))


def _receive_exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionResetError("the other side has gone")
        view = view[count:]
    return data
