from __future__ import annotations

import struct
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ipc.wire import MAX_FRAME, FrameBuffer, Message, Step, TextReady, decode, encode
from engine.request import Load

KINDS = typing.get_args(Message)
messages = st.one_of(*(st.from_type(kind) for kind in KINDS))


@given(st.lists(messages, max_size=4), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_messages_survive_a_byte_stream_cut_anywhere(sent: list[Message], size: int) -> None:
    data = b"".join(map(encode, sent))
    buffer = FrameBuffer()
    received = [m for at in range(0, len(data), size) for m in buffer.feed(data[at : at + size])]
    assert repr(received) == repr(sent)  # NaN is not equal to itself


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"type":"Nothing"}', b'{"type":"Step","no":1}', b"\xff"]
)
def test_anything_else_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - JSON's and ours both
        decode(body)


def test_a_frame_beyond_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(ValueError, match="exceeds the limit"):
        list(FrameBuffer().feed(struct.pack(">I", MAX_FRAME + 1)))


def test_whole_frames_do_not_wait_for_the_next() -> None:
    buffer = FrameBuffer()
    data = encode(TextReady()) + encode(TextReady())
    assert list(buffer.feed(data[:-1])) == [TextReady()]
    assert list(buffer.feed(data[-1:])) == [TextReady()]


def test_defaults_need_not_travel() -> None:
    assert decode(b'{"type":"Step","step":3,"load":{"running":1}}') == Step(3, Load(running=1))
