"""A client's request into a journal: checks each parameter, and fills in those that the client left out."""

from __future__ import annotations

import math
import secrets

from dataplane.gateway.journal import Journal
from engine.scheduling.validation import MAX_BAD_WORDS, MAX_BIAS, MAX_BIASES, MAX_LOGPROBS, MAX_PENALTY
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import inference_pb2, types_pb2

MAX_CLIENT_CHOICES = 16  # below the engine's own limit, `engine.scheduling.validation.MAX_CHOICES`
MAX_STOPS = 16
MAX_ID_LENGTH = 128
DEFAULT_MAX_TOKENS = 16


def journal_for(request: inference_pb2.GenerateRequest) -> Journal:
    """A new journal for a request. Raises PhalanxError with the `param` that is wrong.

    The replica checks the limits that depend on its model: context length, vocabulary.
    """
    submit = shard_pb2.Submit(
        request_id=request.request_id or f"req-{secrets.token_hex(12)}",
        n=request.n or 1,
        resume_key=secrets.token_hex(16),
    )
    if len(submit.request_id) > MAX_ID_LENGTH:
        raise _invalid("request_id", f"must have at most {MAX_ID_LENGTH} characters")
    if not request.model:
        raise _invalid("model", "must name a model")
    if submit.n > MAX_CLIENT_CHOICES:
        raise _invalid("n", f"must be at most {MAX_CLIENT_CHOICES}")
    _copy_prompt(request, submit)
    _copy_sampling(request, submit)
    _copy_stopping(request, submit)
    if request.HasField("logprobs"):
        if request.logprobs > MAX_LOGPROBS:
            raise _invalid("logprobs", f"must be at most {MAX_LOGPROBS}")
        submit.logprobs = request.logprobs
    if request.HasField("prompt_logprobs"):
        if request.prompt_logprobs > MAX_LOGPROBS:
            raise _invalid("prompt_logprobs", f"must be at most {MAX_LOGPROBS}")
        submit.prompt_logprobs = request.prompt_logprobs
    submit.priority = request.priority
    return Journal(request.model, submit)


def _copy_prompt(request: inference_pb2.GenerateRequest, submit: shard_pb2.Submit) -> None:
    match request.WhichOneof("prompt"):
        case "text":
            submit.text = request.text
            empty = not request.text
        case "token_ids":
            submit.token_ids.CopyFrom(request.token_ids)
            empty = not request.token_ids.ids
        case "chat":
            submit.chat.CopyFrom(request.chat)
            empty = not request.chat.messages
        case _:
            empty = True
    if empty:
        raise PhalanxError("EMPTY_PROMPT", "the prompt is empty", param="prompt")


def _copy_sampling(request: inference_pb2.GenerateRequest, submit: shard_pb2.Submit) -> None:
    given, sampling = request.sampling, submit.sampling
    sampling.temperature = given.temperature if given.HasField("temperature") else 1.0
    sampling.top_k = given.top_k
    sampling.top_p = given.top_p if given.HasField("top_p") else 1.0
    sampling.min_p = given.min_p
    sampling.seed = given.seed if given.HasField("seed") else secrets.randbits(63)
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise _invalid("temperature", "must be 0 or greater")
    if not 0 < sampling.top_p <= 1:
        raise _invalid("top_p", "must be greater than 0 and at most 1")
    if not 0 <= sampling.min_p <= 1:
        raise _invalid("min_p", "must be between 0 and 1")
    _copy_logits_processors(given, sampling)


def _copy_logits_processors(given: types_pb2.Sampling, sampling: types_pb2.Sampling) -> None:
    sampling.repetition_penalty = given.repetition_penalty if given.HasField("repetition_penalty") else 1.0
    sampling.presence_penalty = given.presence_penalty
    sampling.frequency_penalty = given.frequency_penalty
    sampling.bad_words[:] = given.bad_words
    for token, bias in given.logit_bias.items():
        sampling.logit_bias[token] = bias
    if not (math.isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0):
        raise _invalid("repetition_penalty", "must be greater than 0")
    for name in ("presence_penalty", "frequency_penalty"):
        if not -MAX_PENALTY <= getattr(sampling, name) <= MAX_PENALTY:
            raise _invalid(name, f"must be between -{MAX_PENALTY:g} and {MAX_PENALTY:g}")
    biases = given.logit_bias.values()
    if len(biases) > MAX_BIASES or not all(-MAX_BIAS <= bias <= MAX_BIAS for bias in biases):
        raise _invalid(
            "logit_bias", f"must be at most {MAX_BIASES} numbers between -{MAX_BIAS:g} and {MAX_BIAS:g}"
        )
    # The engine counts token sequences, and a word becomes at most two: with and without a space before it.
    if len(given.bad_words) > MAX_BAD_WORDS // 2 or not all(word.strip() for word in given.bad_words):
        raise _invalid("bad_words", f"must be at most {MAX_BAD_WORDS // 2} texts, none of them blank")
    if given.HasField("grammar"):
        if given.grammar.WhichOneof("source") is None:
            raise _invalid("grammar", "must have a source")
        sampling.grammar.CopyFrom(given.grammar)


def _copy_stopping(request: inference_pb2.GenerateRequest, submit: shard_pb2.Submit) -> None:
    given, stopping = request.stopping, submit.stopping
    stopping.CopyFrom(given)
    if not given.HasField("max_tokens"):
        stopping.max_tokens = 0 if request.WhichOneof("prompt") == "chat" else DEFAULT_MAX_TOKENS
    elif given.max_tokens == 0:
        raise _invalid("max_tokens", "must be at least 1")
    if stopping.max_tokens and stopping.min_tokens > stopping.max_tokens:
        raise _invalid("min_tokens", f"must be at most max_tokens, which is {stopping.max_tokens}")
    if len(given.stop) > MAX_STOPS or not all(given.stop):
        raise _invalid("stop", f"must be at most {MAX_STOPS} texts, none of them empty")


def _invalid(param: str, rule: str) -> PhalanxError:
    return PhalanxError("INVALID_ARGUMENT", f"{param} {rule}", param=param)
