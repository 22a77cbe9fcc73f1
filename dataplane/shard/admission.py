"""Checks of a Submit before any work is done for it: pure, and cheap whatever its size.

The engine checks the values again, and more of them (`engine.scheduling.validation`). Here are the limits
whose violation would cost the children time or memory, or make a frame to them too large.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.ipc.wire import MAX_FRAME
from engine.scheduling.validation import MAX_CHOICES
from engine.text.prompt_length import too_many_bytes, too_many_tokens
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError

MAX_SUBMIT_BYTES = MAX_FRAME // 8  # a byte of protobuf becomes at most 6 of JSON; 2 are left for field names


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model of an epoch. Lengths are in tokens; a `longest_token_bytes` of 0 is unknown."""

    hash: str
    max_model_len: int
    longest_token_bytes: int = 0


def admit(submit: shard_pb2.Submit, model: ServedModel) -> None:
    """Check that an attempt may start.

    Raises:
        PhalanxError: INVALID_ARGUMENT, MODEL_CHANGED or PROMPT_TOO_LONG.
    """
    problem = _problem(submit)
    if problem is not None:
        raise PhalanxError("INVALID_ARGUMENT", problem)
    if submit.model_hash not in ("", model.hash):
        raise PhalanxError("MODEL_CHANGED", "the request began on another model")
    if submit.WhichOneof("prompt") == "token_ids":
        check_length(len(submit.token_ids.ids), model)
    elif model.longest_token_bytes:
        size = _text_bytes(submit)
        if size > model.max_model_len * model.longest_token_bytes:
            raise PhalanxError("PROMPT_TOO_LONG", too_many_bytes(size, model.max_model_len))
    # Only the ids of prior output go to the children, at most 5 bytes each.
    delivered = sum(prior.ByteSize() - 5 * len(prior.token_ids) for prior in submit.prior)
    if submit.ByteSize() - max(0, delivered) > MAX_SUBMIT_BYTES:
        raise PhalanxError(
            "INVALID_ARGUMENT",
            f"the request has {submit.ByteSize()} bytes; a request has at most {MAX_SUBMIT_BYTES}",
        )


def check_length(tokens: int, model: ServedModel) -> None:
    """Check that a prompt of so many tokens leaves room for one. Raises PhalanxError: PROMPT_TOO_LONG."""
    if tokens >= model.max_model_len:
        raise PhalanxError("PROMPT_TOO_LONG", too_many_tokens(tokens, model.max_model_len))


def _problem(submit: shard_pb2.Submit) -> str | None:
    """Why a Submit is malformed, None if it is not."""
    if submit.WhichOneof("prompt") is None:
        return "the prompt is missing"
    if not 1 <= submit.n <= MAX_CHOICES:
        return f"n must be between 1 and {MAX_CHOICES}, not {submit.n}"
    if submit.prior and len(submit.prior) != submit.n:
        return f"prior has {len(submit.prior)} entries for {submit.n} choices"
    if submit.prior and all(prior.finish_reason for prior in submit.prior):
        return "every choice has ended already"
    return None


def _text_bytes(submit: shard_pb2.Submit) -> int:
    """UTF-8 bytes of a text, or of the contents of a conversation: a template may leave out the roles."""
    if submit.WhichOneof("prompt") == "chat":
        return sum(len(message.content.encode()) for message in submit.chat.messages)
    return len(submit.text.encode())
