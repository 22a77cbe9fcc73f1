from __future__ import annotations

import json
from typing import Any

import pytest

from dataplane.gateway import openai
from dataplane.gateway.normalize import journal_for
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import inference_pb2, types_pb2

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}}


def asked(shape: Any = openai.CompletionRequest, **fields: Any) -> inference_pb2.GenerateRequest:
    prompt = (
        {"messages": [{"role": "user", "content": "hi"}]} if shape is openai.ChatRequest else {"prompt": "x"}
    )
    body = {"model": "demo", **prompt, **fields}
    return openai.to_generate(openai.parse(json.dumps(body).encode(), shape))


def submit(**fields: Any) -> shard_pb2.Submit:
    """What travels with every attempt."""
    return journal_for(asked(**fields)).template


def test_penalties_and_their_like_reach_every_attempt() -> None:
    got = submit(
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        logit_bias={"7": -100, "9": 3.5},
        bad_words=["mud"],
        min_tokens=3,
        prompt_logprobs=2,
        priority=-1,
    )
    sampling = got.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert sampling.repetition_penalty == 1.1
    assert dict(sampling.logit_bias) == {7: -100.0, 9: 3.5}
    assert list(sampling.bad_words) == ["mud"]
    assert (got.stopping.min_tokens, got.prompt_logprobs, got.priority) == (3, 2, -1)


def test_what_is_left_out_has_no_effect() -> None:
    got = submit()
    assert (got.sampling.repetition_penalty, got.sampling.presence_penalty) == (1.0, 0.0)
    assert not got.sampling.HasField("grammar")
    assert not got.HasField("prompt_logprobs")


@pytest.mark.parametrize(
    ("fields", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            "json_schema",
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema"),
        ({"structured_outputs": {"regex": "a+"}}, "regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice"),
        ({"structured_outputs": {"json_object": True}}, "json_object"),
        ({"guided_json": SCHEMA}, "json_schema"),
        ({"guided_regex": "a+"}, "regex"),
        ({"guided_choice": ["a", "b"]}, "choice"),
    ],
)
@pytest.mark.parametrize("shape", [openai.CompletionRequest, openai.ChatRequest])
def test_structure_can_be_asked_for_by_each_of_its_names(shape: Any, fields: Any, source: str) -> None:
    grammar = asked(shape, **fields).sampling.grammar
    assert grammar.WhichOneof("source") == source
    if source == "json_schema":
        assert json.loads(grammar.json_schema) == SCHEMA
    elif source == "choice":
        assert list(grammar.choice.texts) == ["a", "b"]


def test_a_text_format_asks_for_nothing() -> None:
    assert not asked(response_format={"type": "text"}).sampling.HasField("grammar")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"presence_penalty": 2.5}, "INVALID_ARGUMENT"),
        ({"frequency_penalty": -2.5}, "INVALID_ARGUMENT"),
        ({"repetition_penalty": 0}, "INVALID_ARGUMENT"),
        ({"logit_bias": {"7": 101}}, "INVALID_ARGUMENT"),
        ({"logit_bias": {"-7": 1}}, "INVALID_ARGUMENT"),
        ({"logit_bias": {"seven": 1}}, "INVALID_ARGUMENT"),
        ({"bad_words": [" "]}, "INVALID_ARGUMENT"),
        ({"min_tokens": 17}, "INVALID_ARGUMENT"),
        ({"min_tokens": -1}, "INVALID_ARGUMENT"),
        ({"prompt_logprobs": 21}, "INVALID_ARGUMENT"),
        ({"priority": 2**40}, "INVALID_ARGUMENT"),
        ({"response_format": {"type": "json_schema"}}, "INVALID_ARGUMENT"),
        ({"response_format": {"type": "yaml"}}, "INVALID_ARGUMENT"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "INVALID_ARGUMENT"),
        ({"best_of": 2}, "UNSUPPORTED"),
        ({"best_of": 1, "n": 2}, "UNSUPPORTED"),
        ({"echo": True}, "UNSUPPORTED"),
    ],
)
def test_what_is_out_of_range_or_not_offered_is_refused(fields: Any, reason: str) -> None:
    with pytest.raises(PhalanxError) as caught:
        submit(**fields)
    assert caught.value.reason == reason


def test_a_grammar_without_a_source_is_refused() -> None:
    request = asked()
    request.sampling.grammar.CopyFrom(types_pb2.Grammar())
    with pytest.raises(PhalanxError, match="grammar"):
        journal_for(request)
