from __future__ import annotations

import json
from typing import Any

import pytest

from dataplane.shard.convert import extend, to_delta, to_prior, to_request
from engine.request import Delta, Grammar, PositionLogprobs, SamplingParams, TokenLogprob
from phalanx.internal.v1 import shard_pb2
from phalanx.v1 import types_pb2


def submit(**fields: object) -> shard_pb2.Submit:
    return shard_pb2.Submit(n=1, **fields)  # type: ignore[arg-type]


def test_what_a_gateway_sets_reaches_the_engine() -> None:
    sampling = types_pb2.Sampling(
        temperature=0.0,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=0.25,
        logit_bias={9: 1.0, 3: -2.0},
        bad_words=["mud"],
        grammar=types_pb2.Grammar(regex="a+"),
    )
    stopping = types_pb2.Stopping(max_tokens=9, min_tokens=4)
    got = to_request(
        "r", submit(sampling=sampling, stopping=stopping, prompt_logprobs=0, priority=-3), (1,), ((5, 6),)
    )
    assert got.sampling == SamplingParams(
        0.0,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=0.25,
        logit_bias=((3, -2.0), (9, 1.0)),
        min_tokens=4,
        bad_words=((5, 6),),
        grammar=Grammar("regex", "a+"),
    )
    assert (got.max_tokens, got.prompt_logprobs, got.priority) == (9, 0, -3)


def test_what_a_gateway_leaves_out_keeps_its_default() -> None:
    got = to_request("r", submit(), (1,))
    assert got.sampling == SamplingParams()
    assert got.prompt_logprobs is None


@pytest.mark.parametrize(
    ("grammar", "wanted"),
    [
        (types_pb2.Grammar(json_schema="{}"), Grammar("json_schema", "{}")),
        (types_pb2.Grammar(json_object=types_pb2.Grammar.JsonObject()), Grammar("json_object")),
        (types_pb2.Grammar(regex="a"), Grammar("regex", "a")),
        (
            types_pb2.Grammar(choice=types_pb2.Grammar.Choice(texts=["a", "é"])),
            Grammar("choice", json.dumps(["a", "é"])),
        ),
    ],
)
def test_every_kind_of_grammar_has_its_counterpart(grammar: types_pb2.Grammar, wanted: Grammar) -> None:
    assert (
        to_request("r", submit(sampling=types_pb2.Sampling(grammar=grammar)), (1,)).sampling.grammar == wanted
    )


def test_log_probabilities_of_the_prompt_come_with_their_delta() -> None:
    entry = PositionLogprobs(TokenLogprob(4, -1.0, "d"), (TokenLogprob(5, -0.5, "e"),))
    got = to_delta("r", 2, Delta("x", 0, 0, (7,), ("g",), prompt_logprobs=(entry,)))
    (position,) = got.prompt_logprobs
    assert (position.chosen.token_id, position.chosen.text, position.top[0].logprob) == (4, "d", -0.5)


def test_what_a_choice_has_generated_adds_up_to_the_prior_output_of_the_next_attempt() -> None:
    prompt = types_pb2.PositionLogprobs(chosen=types_pb2.TokenLogprob(token_id=1))
    position = types_pb2.PositionLogprobs(chosen=types_pb2.TokenLogprob(token_id=2))
    output = shard_pb2.Delta(choice=1)
    for news in (
        {"token_ids": [5], "pieces": ["a"], "prompt_logprobs": [prompt], "cached_tokens": 16},
        {"index": 1, "token_ids": [6, 7], "pieces": ["b", ""], "logprobs": [position] * 2},
        {"index": 3, "token_ids": [8], "pieces": ["c"], "cached_tokens": 3, "finish_reason": 1},
    ):
        more: dict[str, Any] = {"request_id": "r", "attempt": 2, "choice": 1, **news}
        extend(output, shard_pb2.Delta(**more))
    assert to_prior(output) == shard_pb2.Delta(
        choice=1,
        token_ids=[5, 6, 7, 8],
        pieces=["a", "b", "", "c"],
        logprobs=[position] * 2,
        prompt_logprobs=[prompt],
        cached_tokens=16,
        finish_reason=types_pb2.FINISH_REASON_STOP,
    )
