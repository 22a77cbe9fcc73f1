"""OpenAI-compatible JSON answers: chunks into completion objects, and errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import msgspec

from dataplane.gateway.journal import Chunk
from dataplane.gateway.openai import ChatRequest, CompletionRequest, Json
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import types_pb2

_FINISH = {
    types_pb2.FINISH_REASON_UNSPECIFIED: None,
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
    types_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


class AnswerFormat(msgspec.Struct):
    """What the client wants in its answer. It travels with the request: another gateway may continue it."""

    id: str
    created: int
    model: str
    chat: bool = False
    token_ids: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    usage: bool = False

    @classmethod
    def of(cls, request: CompletionRequest | ChatRequest, request_id: str, created: int) -> Self:
        """The format that a request asks for. `created` is in seconds since the Unix epoch."""
        chat = isinstance(request, ChatRequest)
        return cls(
            id=f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            created=created,
            model=request.model,
            chat=chat,
            token_ids=request.return_token_ids,
            logprobs=request.logprobs is not None and request.logprobs is not False,
            prompt_logprobs=request.prompt_logprobs is not None,
            usage=bool(request.stream_options and request.stream_options.include_usage),
        )


class AnswerBuilder:
    """Builds the JSON objects of one answer: `chunk` and `last` for a stream, `whole` for one object.

    `offset` returns the number of characters before a choice's position: a resumed stream begins past 0.
    """

    def __init__(
        self, answer_format: AnswerFormat, offset: Callable[[int, int], int] = lambda choice, index: 0
    ) -> None:
        self._format = answer_format
        self._head: Json = {
            "id": answer_format.id,
            "created": answer_format.created,
            "model": answer_format.model,
        }
        self._offset, self._offsets = offset, dict[int, int]()

    def chunk(self, chunk: Chunk) -> Json:
        """One event of a stream."""
        choice: Json = {"index": chunk.choice}
        if self._format.chat:
            first = {"role": "assistant"} if chunk.index == 0 else {}
            choice["delta"] = {**first, "content": chunk.text}
        else:
            choice["text"] = chunk.text
        choice["finish_reason"] = _FINISH[chunk.finish]
        choice["logprobs"] = self._logprobs(chunk)
        if self._format.token_ids:
            choice["token_ids"] = list(chunk.token_ids)
        if self._format.prompt_logprobs and chunk.index == 0:
            choice["prompt_logprobs"] = _prompt_logprobs(chunk)
        event = self._event([choice])
        if self._format.usage:
            event["usage"] = None
        return event

    def last(self, usage: types_pb2.Usage) -> Json | None:
        """The event after the last token: usage, if the client asked for it."""
        return {**self._event([]), "usage": usage_json(usage)} if self._format.usage else None

    def whole(self, chunks: Sequence[Chunk], usage: types_pb2.Usage) -> Json:
        """The answer as one object. `chunks` has all tokens; a choice's tokens may come in several chunks."""
        choices: dict[int, Json] = {}
        for chunk in chunks:
            choice = choices.setdefault(chunk.choice, {"index": chunk.choice, "text": "", "token_ids": []})
            choice["text"] += chunk.text
            choice["token_ids"] += chunk.token_ids
            choice["finish_reason"] = _FINISH[chunk.finish]
            choice["logprobs"] = _merge(choice.get("logprobs"), self._logprobs(chunk))
            if self._format.prompt_logprobs:
                choice.setdefault("prompt_logprobs", _prompt_logprobs(chunk))
        for choice in choices.values():
            if not self._format.token_ids:
                del choice["token_ids"]
            if self._format.chat:
                choice["message"] = {"role": "assistant", "content": choice.pop("text")}
        whole = self._event([choices[number] for number in sorted(choices)])
        whole["object"] = "chat.completion" if self._format.chat else "text_completion"
        return {**whole, "usage": usage_json(usage)}

    def _event(self, choices: list[Json]) -> Json:
        kind = "chat.completion.chunk" if self._format.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _logprobs(self, chunk: Chunk) -> Json | None:
        if not self._format.logprobs:
            return None
        if self._format.chat:
            content = [
                {
                    **_chat_logprob(position.chosen),
                    "top_logprobs": [_chat_logprob(top) for top in position.top],
                }
                for position in chunk.logprobs
            ]
            return {"content": content}
        offset = self._offsets.get(chunk.choice)
        if offset is None:
            offset = self._offset(chunk.choice, chunk.index)
        offsets = []
        for piece in chunk.pieces:
            offsets.append(offset)
            offset += len(piece)
        self._offsets[chunk.choice] = offset
        return {
            "tokens": [position.chosen.text for position in chunk.logprobs],
            "token_logprobs": [position.chosen.logprob for position in chunk.logprobs],
            "top_logprobs": [{top.text: top.logprob for top in position.top} for position in chunk.logprobs],
            "text_offset": offsets,
        }


def usage_json(usage: types_pb2.Usage) -> Json:
    """The usage object."""
    details = {"prompt_tokens_details": {"cached_tokens": usage.cached_tokens}} if usage.cached_tokens else {}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        **details,
    }


def error_json(error: PhalanxError) -> Json:
    """The error object."""
    kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.reason.lower(),
            "retryable": error.retryable,
        }
    }


def _chat_logprob(token: types_pb2.TokenLogprob) -> Json:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}


def _prompt_logprobs(chunk: Chunk) -> list[Json | None] | None:
    """One entry per prompt token, None for the first token. Only the first choice has them."""
    if chunk.choice > 0:
        return None
    return [
        None,
        *(
            {
                str(token.token_id): {"logprob": token.logprob, "decoded_token": token.text}
                for token in (*position.top, position.chosen)
            }
            for position in chunk.prompt_logprobs
        ),
    ]


def _merge(before: Json | None, after: Json | None) -> Json | None:
    if before is None or after is None:
        return after
    return {name: before[name] + after[name] for name in before}
