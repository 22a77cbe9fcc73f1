"""What a request must be like to be served."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import RequestError
from engine.grammar.validation import check_grammar
from engine.request import Request, SamplingParams
from engine.text.prompt_length import too_many_tokens

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_PENALTY = 2.0  # of presence and frequency, either way
MAX_BIAS = 100.0  # either way
MAX_BIASES = 1024
MAX_BAD_WORDS = 1024
MAX_PROMPT_LOGPROBS = 100_000  # of all a prompt's tokens together: they travel in one message


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine can hold and how it divides a step.

    `kv_blocks` blocks hold at least one sequence of `max_model_len`. `window`: keys, counted back from a
    query and with its own, that any layer looks at; None for all. `weight_tokens`: the tokens whose computing
    takes as long as reading the weights once, by which prompts are measured out beside decodes (see
    `budget`), unless `max_prefill_tokens` says how many of theirs a step takes. `ahead`: a step is
    planned while the one before runs, and with it what that one will have drawn.
    """

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    kv_blocks: int = 1024
    block_size: int = 16
    max_batch_tokens: int = 512
    max_running: int = 64
    window: int | None = None
    prefix_cache: bool = True
    max_prefill_tokens: int = 0
    weight_tokens: int = 16
    ahead: bool = False

    def __post_init__(self) -> None:
        if self.kv_blocks < self.blocks_per_sequence:
            raise ValueError(
                f"{self.kv_blocks} KV blocks of {self.block_size} cannot hold {self.max_model_len} tokens"
            )

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks that a sequence holds at most at once."""
        in_flight = self.max_batch_tokens * (2 if self.ahead else 1)
        return blocks_per_sequence(self.max_model_len, self.window, in_flight, self.block_size)


def blocks_per_sequence(length: int, window: int | None, in_flight: int, block_size: int) -> int:
    """Blocks that a sequence of `length` tokens holds at most at once, with so many of them in flight."""
    blocks = -(-length // block_size)
    # What is looked at may begin with the last token of a block.
    return blocks if window is None else min(blocks, -(-(window + in_flight) // block_size) + 1)


def validate(request: Request, limits: Limits) -> None:
    """See that a request is well-formed and fits.

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
    _validate_rules(request, limits)


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


def _validate_rules(request: Request, limits: Limits) -> None:
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
    most = request.max_tokens or limits.max_model_len - len(request.prompt_ids)
    if not 0 <= sampling.min_tokens <= most:
        raise _invalid(f"min_tokens must be between 0 and max_tokens {most}, not {sampling.min_tokens}")
    if not all(sampling.bad_words) or len(sampling.bad_words) > MAX_BAD_WORDS:
        raise _invalid(f"bad_words must be at most {MAX_BAD_WORDS}, none of them empty")
    if sampling.grammar is not None:
        check_grammar(sampling.grammar)


def _invalid(message: str) -> RequestError:
    return RequestError("INVALID_ARGUMENT", message)
