"""Messages between a worker and its children: the engine process and the text process.

They travel over Unix socket pairs as length-prefixed JSON: the engine must run where only torch, numpy,
safetensors and transformers are installed. One frame carries one message as `{"type": name, ...fields}`.
This module needs the standard library only.

A worker starts `engine.processes.rank` for every rank and, on the leader, `engine.text.process`. Each gets
one end of a pair; the first message to it is `StartEngine` or `StartText`. The leader's engine and the text
process have a further pair of their own, for `Step`. A closed socket means that the other side is gone.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Union

from engine.config import EngineConfig
from engine.request import Delta, Load, Refusal, Request

MAX_FRAME = 64 << 20
BEAT_S = 0.5
_LENGTH = struct.Struct(">I")


# Worker to engine


@dataclass(frozen=True, slots=True)
class StartEngine:
    """Load this rank of the model and join the group."""

    config: EngineConfig


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the group meets, as `host:port`. Rank 0 sends it; its worker passes it on to every other rank."""

    address: str


@dataclass(frozen=True, slots=True)
class SubmitRequest:
    """Queue a request (rank 0 only). Answered in `Step.accepted` or `Step.failed`."""

    request: Request


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """End a request, all of it or one choice (rank 0 only). Unknown ids are ignored."""

    id: str
    choice: int | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask whether every rank computes (rank 0 only). `Alive` answers, after a canary if there is no work."""


# Engine to worker


@dataclass(frozen=True, slots=True)
class Loading:
    """Progress of loading, 0 to 1."""

    fraction: float


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The whole group has run a step together (rank 0), or this rank has joined it (the others).

    `step_s`: how long a small step of the whole group took; sent by rank 0.
    """

    model_hash: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    step_s: float = dataclasses.field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The last message of a child that fails, or the text process's report of an engine that does.

    `permanent`: the same model and layout will fail again.
    """

    reason: str
    message: str
    permanent: bool


@dataclass(frozen=True, slots=True)
class Began:
    """A step of `tokens` tokens begins. Its `StepEnded` follows; steps end in the order they begin."""

    tokens: int


@dataclass(frozen=True, slots=True)
class StepEnded:
    """The oldest step in flight has ended on every rank. Its `Step` goes to the text process."""


@dataclass(frozen=True, slots=True)
class Alive:
    """The answer to `Probe`."""


# Engine to text process to worker


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did: requests queued, tokens generated, requests refused.

    The leader's engine sends it to the text process over a socket of their own. The text process fills
    `pieces` and `engine` and sends it to the worker, in the same order. A delta that completes a stop text is
    cut after the token that completes it and gets the finish "stop". Later deltas of that choice have no
    tokens; the worker drops them.

    `engine`: the number that the worker gave to the engine's socket. The worker drops the steps of engines
    that do not serve any more.
    """

    step: int
    load: Load
    accepted: tuple[str, ...] = ()
    deltas: tuple[Delta, ...] = ()
    failed: tuple[Refusal, ...] = ()
    engine: int = 0


# Any child to its worker. The ranks of an offline engine send none


@dataclass(frozen=True, slots=True)
class Beat:
    """The process runs, whatever it is busy with. A thread that does nothing else sends this every BEAT_S."""


# Worker to text process


@dataclass(frozen=True, slots=True)
class StartText:
    """Load the tokeniser of this model directory. With `ids_only` the directory may have none."""

    model: str
    ids_only: bool = False


@dataclass(frozen=True, slots=True)
class Encode:
    """Tokenise a request's prompt, and detokenise its output from now on.

    The prompt is a text, or a conversation of (role, content) pairs for the model's chat template. There is
    neither if the worker already has its token ids. A prompt of `max_model_len` tokens or more is refused as
    PROMPT_TOO_LONG; 0 is no limit. `bad_words` are tokenised as an output may spell them: at its beginning
    and after a space.

    `n`: number of choices. `prior`: the token ids that earlier attempts generated, per choice. Their text has
    been delivered; the detokeniser's state is rebuilt from them. A stop text counts if it ends in the text of
    a token after the first `min_tokens`.

    Answered by `Encoded` or `NotEncoded`. The worker submits the request to the engine only after `Encoded`,
    so the engine's first delta cannot overtake this message.
    """

    id: str
    text: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    max_model_len: int = 0
    bad_words: tuple[str, ...] = ()
    n: int = 1
    prior: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop a request's detokeniser, and its prompt if it is not tokenised yet. Unknown ids are ignored."""

    id: str


# Text process to worker


@dataclass(frozen=True, slots=True)
class TextReady:
    """The tokeniser is loaded.

    `longest_token_bytes` is an upper bound of the UTF-8 bytes of text that one token stands for;
    0 if no bound is known.
    """

    longest_token_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """The answer to `Encode`. `bad_words` has every spelling of every word."""

    id: str
    token_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class NotEncoded:
    """`Encode` was refused."""

    refusal: Refusal


Message = Union[  # noqa: UP007 - with `|`, this would be one name a line
    StartEngine, Rendezvous, SubmitRequest, CancelRequest, Probe, Loading, EngineReady, EngineFailed, Began,
    StepEnded, Step, Alive, Beat,
    StartText, Encode, Forget, TextReady, Encoded, NotEncoded,
]  # fmt: skip
_TYPES: dict[str, type[Any]] = {cls.__name__: cls for cls in typing.get_args(Message)}


def encode(message: Message) -> bytes:
    """One frame: a 4-byte big-endian length, then JSON."""
    body = json.dumps(
        {"type": type(message).__name__} | _fields(message), default=_fields, separators=(",", ":")
    )
    data = body.encode()
    return _LENGTH.pack(len(data)) + data


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def decode(body: bytes | bytearray | memoryview) -> Message:
    """The message in one frame's body. Raises ValueError on anything else."""
    fields = json.loads(bytes(body))
    try:
        cls = _TYPES[fields.pop("type")]
        message: Message = _build(cls, fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a message of the engine's wire: {error!r}") from error
    return message


def _build(annotation: Any, value: Any) -> Any:
    """Turn a JSON value into the dataclasses and tuples that a type annotation names."""
    build = _builder(annotation)
    return value if build is None else build(value)


@cache
def _builder(annotation: Any) -> Any:
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        nested = {name: build for name, hint in hints.items() if (build := _builder(hint)) is not None}

        def build_dataclass(value: dict[str, Any]) -> Any:
            for name, build in nested.items():
                if name in value:
                    value[name] = build(value[name])
            return annotation(**value)  # type: ignore[operator]

        return build_dataclass
    origin = typing.get_origin(annotation)
    if origin is tuple:
        items = typing.get_args(annotation)
        if len(items) == 2 and items[1] is Ellipsis:
            build = _builder(items[0])
            return tuple if build is None else (lambda value: tuple(build(item) for item in value))
        return lambda value: tuple(_build(item, part) for item, part in zip(items, value, strict=True))
    if origin in (Union, types.UnionType):
        present = [arm for arm in typing.get_args(annotation) if arm is not type(None)]
        build = _builder(present[0]) if len(present) == 1 else None
        return None if build is None else (lambda value: None if value is None else build(value))
    return None


class FrameBuffer:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Every message that `data` completes. Raises ValueError on a frame too long or without message."""
        self._data += data
        start = 0
        while len(self._data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._data, start)
            if length > MAX_FRAME:
                raise ValueError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME}")
            end = start + _LENGTH.size + length
            if len(self._data) < end:
                break
            body = bytes(self._data[start + _LENGTH.size : end])
            start = end
            yield decode(body)
        del self._data[:start]
