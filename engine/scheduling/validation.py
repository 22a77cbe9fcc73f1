"""Which requests the engine refuses, and why."""

from __future__ import annotations

import math

from engine.errors import RequestError
from engine.grammar.validation import check_grammar
from engine.request import Request, SamplingParams
from engine.scheduling.limits import Limits
from engine.text.prompt_length import too_many_tokens

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_PENALTY = 2.0  # presence and frequency penalties are between -MAX_PENALTY and MAX_PENALTY
MAX_BIAS = 100.0  # logit biases are between -MAX_BIAS and MAX_BIAS
MAX_BIASES = 1024
MAX_BAD_WORDS = 1024
MAX_PROMPT_LOGPROBS = 100_000  # of a whole prompt, alternatives included: all are sent in one message


def validate(request: Request, limits: Limits) -> None:
    """Check that a request is well-formed and within the limits.

    Raises:
        RequestError: with the reason EMPTY_PROMPT, PROMPT_TOO_LONG, MAX_TOKENS_TOO_LARGE,
            INVALID_TOKEN_ID, INVALID_GRAMMAR or INVALID_ARGUMENT.
    """
    length = len(request.prompt_ids)
    if length == 0:
        raise RequestError("EMPTY_PROMPT", "the prompt has no tokens")
    if length >= limits.max_model_len:
        raise RequestError(
            "PROMPT_TOO_LONG",
            too_many_tokens(length, limits.max_model_len),
        )
    if request.max_tokens < 0:
        raise _invalid(f"max_tokens must be at least 1, or 0 for as many as fit, not {request.max_tokens}")
    if length + request.max_tokens > limits.max_model_len:
        raise RequestError(
            "MAX_TOKENS_TOO_LARGE",
            f"max_tokens {request.max_tokens} and a prompt of {length} tokens exceed the limit of "
            f"{limits.max_model_len}",
        )
    _validate_ids(request, limits)
    _validate_choices(request)
    _validate_sampling(request.sampling)
    _validate_logits_processors(request, limits)


def _validate_ids(request: Request, limits: Limits) -> None:
    biased = tuple(token for token, _ in request.sampling.logit_bias)
    bad_words = request.sampling.bad_words
    for ids in (request.prompt_ids, request.stop_token_ids, biased, *bad_words, *request.prior):
        bad = next((token for token in ids if not 0 <= token < limits.vocab_size), None)
        if bad is not None:
            raise RequestError(
                "INVALID_TOKEN_ID", f"token id {bad} is not in the vocabulary of {limits.vocab_size}"
            )


def _validate_choices(request: Request) -> None:
    if not 1 <= request.n <= MAX_CHOICES:
        raise _invalid(f"n must be between 1 and {MAX_CHOICES}, not {request.n}")
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
        raise _invalid(f"logprobs must be between 0 and {MAX_LOGPROBS}, not {request.logprobs}")
    if request.prompt_logprobs is not None:
        if not 0 <= request.prompt_logprobs <= MAX_LOGPROBS:
            raise _invalid(
                f"prompt_logprobs must be between 0 and {MAX_LOGPROBS}, not {request.prompt_logprobs}"
            )
        if len(request.prompt_ids) * (request.prompt_logprobs + 1) > MAX_PROMPT_LOGPROBS:
            raise _invalid(
                f"prompt_logprobs of {len(request.prompt_ids)} tokens with {request.prompt_logprobs} "
                f"alternatives each are more than {MAX_PROMPT_LOGPROBS}"
            )
    if not -(2**31) <= request.priority < 2**31:
        raise _invalid(f"priority must be a 32-bit number, not {request.priority}")
    for name, values in (("prior", request.prior), ("finished", request.finished)):
        if values and len(values) != request.n:
            raise _invalid(f"{name} has {len(values)} entries for {request.n} choices")


def _validate_sampling(sampling: SamplingParams) -> None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise _invalid(f"temperature must be at least 0, not {sampling.temperature}")
    if not 0 <= sampling.top_k < 2**31:
        raise _invalid(f"top_k must be at least 0 and below 2**31, not {sampling.top_k}")
    if not 0 < sampling.top_p <= 1:
        raise _invalid(f"top_p must be above 0 and at most 1, not {sampling.top_p}")
    if not 0 <= sampling.min_p <= 1:
        raise _invalid(f"min_p must be between 0 and 1, not {sampling.min_p}")
    if not 0 <= sampling.seed < 2**64:
        raise _invalid(f"seed must be at least 0 and below 2**64, not {sampling.seed}")


def _validate_logits_processors(request: Request, limits: Limits) -> None:
    sampling = request.sampling
    if not (math.isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0):
        raise _invalid(f"repetition_penalty must be above 0, not {sampling.repetition_penalty}")
    for name, penalty in (
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
    ):
        if not -MAX_PENALTY <= penalty <= MAX_PENALTY:
            raise _invalid(f"{name} must be between -{MAX_PENALTY:g} and {MAX_PENALTY:g}, not {penalty}")
    tokens = [token for token, _ in sampling.logit_bias]
    if len(set(tokens)) != len(tokens):
        raise _invalid("logit_bias has a token twice")
    if len(tokens) > MAX_BIASES:
        raise _invalid(f"logit_bias must have at most {MAX_BIASES} tokens, not {len(tokens)}")
    for _, bias in sampling.logit_bias:
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise _invalid(f"logit_bias must be between -{MAX_BIAS:g} and {MAX_BIAS:g}, not {bias}")
    max_tokens = request.max_tokens or limits.max_model_len - len(request.prompt_ids)
    if not 0 <= sampling.min_tokens <= max_tokens:
        raise _invalid(f"min_tokens must be between 0 and max_tokens {max_tokens}, not {sampling.min_tokens}")
    if not all(sampling.bad_words) or len(sampling.bad_words) > MAX_BAD_WORDS:
        raise _invalid(f"bad_words must be at most {MAX_BAD_WORDS}, none of them empty")
    if sampling.grammar is not None:
        check_grammar(sampling.grammar)


def _invalid(message: str) -> RequestError:
    return RequestError("INVALID_ARGUMENT", message)
