"""OpenAI-compatible JSON requests into GenerateRequest. Answers are in `openai_answer`.

Field names are those of the OpenAI API reference. In addition there are `top_k`, `min_p`,
`repetition_penalty`, `min_tokens`, `bad_words`, `structured_outputs`, `prompt_logprobs`, `priority`,
`ignore_eos`, `stop_token_ids` and `return_token_ids`, with the names that vLLM gives them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import inference_pb2, types_pb2

Json = dict[str, Any]

_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "seed",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Options of a stream."""

    include_usage: bool = False


class TextPart(msgspec.Struct, forbid_unknown_fields=True, tag="text"):
    """A part of a message's content."""

    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: str
    content: str | list[TextPart]
    name: str | None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True, rename={"schema_": "schema"}):
    """A named JSON Schema. `strict` changes nothing: answers always match."""

    name: str
    schema_: Json
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """The format that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """The grammar that the answer must match: one of these. A JSON Schema is an object or a text."""

    json: Json | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None


class _Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    user: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    bad_words: list[str] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    prompt_logprobs: int | None = None
    priority: int = 0


class CompletionRequest(_Common, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | list[int | str | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class ChatRequest(_Common, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


def parse(body: bytes, shape: type[CompletionRequest] | type[ChatRequest]) -> CompletionRequest | ChatRequest:
    """The request in a body. Raises PhalanxError INVALID_ARGUMENT."""
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PhalanxError("INVALID_ARGUMENT", f"the body is not a valid request: {error}") from error


def to_generate(request: CompletionRequest | ChatRequest) -> inference_pb2.GenerateRequest:
    """The same request for gRPC. Raises PhalanxError UNSUPPORTED or INVALID_ARGUMENT."""
    _refuse_unsupported(request)
    out = inference_pb2.GenerateRequest(model=request.model)
    try:
        _copy_prompt(request, out)
        _copy_parameters(request, out)
    except (ValueError, TypeError) as error:  # raised by protobuf, which checks the range of each number
        raise PhalanxError("INVALID_ARGUMENT", f"a number is out of range: {error}") from error
    return out


def _refuse_unsupported(request: CompletionRequest | ChatRequest) -> None:
    if isinstance(request, ChatRequest):
        return
    best_of = request.best_of if request.best_of != (request.n or 1) else None
    refused = {"echo": request.echo, "best_of": best_of, "suffix": request.suffix}
    for name, value in refused.items():
        if value:
            raise PhalanxError("UNSUPPORTED", f"{name} is not supported", param=name)


def _copy_prompt(request: CompletionRequest | ChatRequest, out: inference_pb2.GenerateRequest) -> None:
    if isinstance(request, ChatRequest):
        for message in request.messages:
            content = message.content
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            out.chat.messages.add(role=message.role, content=text)
        out.chat.SetInParent()
        return
    prompt: Any = request.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise PhalanxError("UNSUPPORTED", "one prompt per request; send several requests", param="prompt")
        prompt = prompt[0]
    if isinstance(prompt, str):
        out.text = prompt
    else:
        out.token_ids.ids[:] = prompt
        out.token_ids.SetInParent()


def _copy_parameters(request: CompletionRequest | ChatRequest, out: inference_pb2.GenerateRequest) -> None:
    for name in _SAMPLING:
        if (value := getattr(request, name)) is not None:
            setattr(out.sampling, name, value)
    max_tokens = request.max_tokens
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens is not None:
            max_tokens = request.max_completion_tokens
        if request.logprobs:
            out.logprobs = request.top_logprobs or 0
    elif request.logprobs is not None:
        out.logprobs = request.logprobs
    for token, bias in (request.logit_bias or {}).items():
        out.sampling.logit_bias[int(token)] = bias
    out.sampling.bad_words[:] = request.bad_words or []
    if (grammar := _grammar(request)) is not None:
        out.sampling.grammar.CopyFrom(grammar)
    if request.prompt_logprobs is not None:
        out.prompt_logprobs = request.prompt_logprobs
    out.priority = request.priority
    if request.min_tokens is not None:
        out.stopping.min_tokens = request.min_tokens
    if max_tokens is not None:
        out.stopping.max_tokens = max_tokens
    if request.n is not None:
        if request.n < 1:
            raise PhalanxError("INVALID_ARGUMENT", "n must be at least 1", param="n")
        out.n = request.n
    out.stopping.stop[:] = [request.stop] if isinstance(request.stop, str) else request.stop or []
    out.stopping.stop_token_ids[:] = request.stop_token_ids
    out.stopping.ignore_eos = request.ignore_eos


def _grammar(request: CompletionRequest | ChatRequest) -> types_pb2.Grammar | None:
    """The grammar that the answer must match, whichever parameter gives it."""
    asked = [_formatted(request.response_format), *_structured(request)]
    grammars = [grammar for grammar in asked if grammar is not None]
    if len(grammars) > 1:
        raise PhalanxError("INVALID_ARGUMENT", "the answer can be made to match one thing only")
    return grammars[0] if grammars else None


def _formatted(wanted: ResponseFormat | None) -> types_pb2.Grammar | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return types_pb2.Grammar(json_object=types_pb2.Grammar.JsonObject())
    if wanted.json_schema is None:
        raise PhalanxError("INVALID_ARGUMENT", "json_schema is missing", param="response_format")
    return types_pb2.Grammar(json_schema=_schema_text(wanted.json_schema.schema_))


def _structured(request: CompletionRequest | ChatRequest) -> Iterator[types_pb2.Grammar]:
    outputs = request.structured_outputs or StructuredOutputs()
    for schema in (outputs.json, request.guided_json):
        if schema is not None:
            yield types_pb2.Grammar(json_schema=_schema_text(schema))
    for regex in (outputs.regex, request.guided_regex):
        if regex is not None:
            yield types_pb2.Grammar(regex=regex)
    for texts in (outputs.choice, request.guided_choice):
        if texts is not None:
            yield types_pb2.Grammar(choice=types_pb2.Grammar.Choice(texts=texts))
    if outputs.json_object:
        yield types_pb2.Grammar(json_object=types_pb2.Grammar.JsonObject())


def _schema_text(schema: Json | str) -> str:
    return schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
