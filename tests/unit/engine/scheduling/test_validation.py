from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from engine.errors import RequestError
from engine.request import Grammar, Request, SamplingParams
from engine.scheduling.limits import Limits
from engine.scheduling.validation import validate

LIMITS = Limits(vocab_size=100, max_model_len=32, kv_blocks=2, block_size=16)
GOOD = Request("a", (1, 2, 3), SamplingParams(), max_tokens=4)


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": SamplingParams(**fields)}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt_ids": ()}, "EMPTY_PROMPT"),
        ({"prompt_ids": (1,) * 32}, "PROMPT_TOO_LONG"),
        ({"max_tokens": 30}, "MAX_TOKENS_TOO_LARGE"),
        ({"max_tokens": -1}, "INVALID_ARGUMENT"),
        ({"prompt_ids": (1, 100)}, "INVALID_TOKEN_ID"),
        ({"prompt_ids": (-1,)}, "INVALID_TOKEN_ID"),
        ({"stop_token_ids": (100,)}, "INVALID_TOKEN_ID"),
        ({"prior": ((100,),)}, "INVALID_TOKEN_ID"),
        ({"n": 0}, "INVALID_ARGUMENT"),
        ({"n": 129}, "INVALID_ARGUMENT"),
        ({"n": 2, "prior": ((1,),)}, "INVALID_ARGUMENT"),
        ({"finished": (True, False)}, "INVALID_ARGUMENT"),
        ({"logprobs": 21}, "INVALID_ARGUMENT"),
        ({"logprobs": -1}, "INVALID_ARGUMENT"),
        (sampling(temperature=-0.1), "INVALID_ARGUMENT"),
        (sampling(temperature=math.nan), "INVALID_ARGUMENT"),
        (sampling(temperature=math.inf), "INVALID_ARGUMENT"),
        (sampling(top_k=-1), "INVALID_ARGUMENT"),
        (sampling(top_k=2**31), "INVALID_ARGUMENT"),
        (sampling(top_p=0.0), "INVALID_ARGUMENT"),
        (sampling(top_p=1.1), "INVALID_ARGUMENT"),
        (sampling(top_p=math.nan), "INVALID_ARGUMENT"),
        (sampling(min_p=-0.1), "INVALID_ARGUMENT"),
        (sampling(min_p=1.1), "INVALID_ARGUMENT"),
        (sampling(seed=-1), "INVALID_ARGUMENT"),
        (sampling(seed=2**64), "INVALID_ARGUMENT"),
        (sampling(repetition_penalty=0.0), "INVALID_ARGUMENT"),
        (sampling(repetition_penalty=math.inf), "INVALID_ARGUMENT"),
        (sampling(presence_penalty=2.1), "INVALID_ARGUMENT"),
        (sampling(presence_penalty=math.nan), "INVALID_ARGUMENT"),
        (sampling(frequency_penalty=-2.1), "INVALID_ARGUMENT"),
        (sampling(logit_bias=((1, 100.5),)), "INVALID_ARGUMENT"),
        (sampling(logit_bias=((1, math.nan),)), "INVALID_ARGUMENT"),
        (sampling(logit_bias=((1, 1.0), (1, 2.0))), "INVALID_ARGUMENT"),
        (sampling(logit_bias=((100, 1.0),)), "INVALID_TOKEN_ID"),
        (sampling(min_tokens=-1), "INVALID_ARGUMENT"),
        (sampling(min_tokens=5), "INVALID_ARGUMENT"),
        ({"max_tokens": 0} | sampling(min_tokens=30), "INVALID_ARGUMENT"),
        (sampling(bad_words=((),)), "INVALID_ARGUMENT"),
        (sampling(bad_words=((1, 100),)), "INVALID_TOKEN_ID"),
        (sampling(grammar=Grammar("regex", "")), "INVALID_GRAMMAR"),
        ({"prompt_logprobs": 21}, "INVALID_ARGUMENT"),
        ({"prompt_logprobs": -1}, "INVALID_ARGUMENT"),
        ({"priority": 2**31}, "INVALID_ARGUMENT"),
    ],
)
def test_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        validate(replace(GOOD, **fields), LIMITS)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt_ids": (1,) * 28},
        {"prompt_ids": (0, 99)},
        {"n": 128, "logprobs": 20},
        sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=2**64 - 1),
        sampling(top_p=1e-9, min_p=1.0),
        sampling(repetition_penalty=1e-3, presence_penalty=-2.0, frequency_penalty=2.0),
        sampling(logit_bias=((0, -100.0), (99, 100.0)), min_tokens=4, bad_words=((0,), (99, 1))),
        {"prompt_logprobs": 20, "priority": -5} | sampling(grammar=Grammar("json_object")),
    ],
)
def test_passed(fields: dict[str, Any]) -> None:
    validate(replace(GOOD, **fields), LIMITS)


def test_limits_hold_a_sequence_of_the_greatest_length() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        Limits(vocab_size=100, max_model_len=33, kv_blocks=2, block_size=16)


def test_more_log_probabilities_than_one_message_holds_are_refused() -> None:
    limits = Limits(vocab_size=100, max_model_len=200_000, kv_blocks=12_500)
    with pytest.raises(RequestError, match="100000"):
        validate(replace(GOOD, prompt_ids=(1,) * 50_000, prompt_logprobs=2), limits)


def test_with_a_window_limits_hold_the_window_and_a_chunk() -> None:
    shape = {"vocab_size": 100, "max_model_len": 1000, "window": 30, "max_batch_tokens": 18}
    assert Limits(**shape, kv_blocks=4, block_size=16).blocks_per_sequence == 4
    with pytest.raises(ValueError, match="cannot hold"):
        Limits(**shape, kv_blocks=3, block_size=16)
