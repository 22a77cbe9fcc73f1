"""Converts between protobuf messages and the engine's values."""

from __future__ import annotations

import json
from collections.abc import Iterable

from engine import request as engine
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime import rpc
from phalanx.runtime.errors import PhalanxError
from phalanx.v1 import types_pb2

UNFINISHED = types_pb2.FINISH_REASON_UNSPECIFIED
_FINISH = {
    None: UNFINISHED,
    "stop": types_pb2.FINISH_REASON_STOP,
    "length": types_pb2.FINISH_REASON_LENGTH,
}


# Fields of Sampling whose name or type differs in the engine.
_CONVERTED = ("logit_bias", "bad_words", "grammar")


def to_request(
    id: str,
    submit: shard_pb2.Submit,
    prompt_ids: tuple[int, ...],
    bad_words: tuple[tuple[int, ...], ...] = (),
) -> engine.Request:
    """The request as the engine takes it. Fields that the gateway left unset keep their defaults.

    `bad_words` are the submit's, tokenised.
    """
    sampling, stopping = submit.sampling, submit.stopping
    given = {field.name: value for field, value in sampling.ListFields() if field.name not in _CONVERTED}
    limit = {"max_tokens": stopping.max_tokens} if stopping.HasField("max_tokens") else {}
    return engine.Request(
        id=id,
        prompt_ids=prompt_ids,
        sampling=engine.SamplingParams(
            **given,
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
            min_tokens=stopping.min_tokens,
            bad_words=bad_words,
            grammar=_to_grammar(sampling.grammar) if sampling.HasField("grammar") else None,
        ),
        stop_token_ids=tuple(stopping.stop_token_ids),
        ignore_eos=stopping.ignore_eos,
        n=submit.n,
        logprobs=submit.logprobs if submit.HasField("logprobs") else None,
        prior=prior_ids(submit),
        finished=tuple(prior.finish_reason != UNFINISHED for prior in submit.prior),
        prompt_logprobs=submit.prompt_logprobs if submit.HasField("prompt_logprobs") else None,
        priority=submit.priority,
        **limit,
    )


def prior_ids(submit: shard_pb2.Submit) -> tuple[tuple[int, ...], ...]:
    """Token ids that earlier attempts generated, per choice; empty at the first attempt."""
    return tuple(tuple(prior.token_ids) for prior in submit.prior)


def _to_grammar(grammar: types_pb2.Grammar) -> engine.Grammar:
    match grammar.WhichOneof("source"):
        case "json_schema":
            return engine.Grammar("json_schema", grammar.json_schema)
        case "json_object":
            return engine.Grammar("json_object")
        case "choice":
            return engine.Grammar("choice", json.dumps(list(grammar.choice.texts)))
        case _:
            return engine.Grammar("regex", grammar.regex)


def to_delta(request_id: str, attempt: int, delta: engine.Delta) -> shard_pb2.Delta:
    """New tokens as they go to a gateway."""
    return shard_pb2.Delta(
        request_id=request_id,
        attempt=attempt,
        choice=delta.choice,
        index=delta.index,
        token_ids=delta.token_ids,
        pieces=delta.pieces,
        logprobs=[_to_position(position) for position in delta.logprobs],
        finish_reason=_FINISH[delta.finish],
        prompt_logprobs=[_to_position(position) for position in delta.prompt_logprobs],
        cached_tokens=delta.cached_tokens,
    )


def extend(output: shard_pb2.Delta, new_tokens: shard_pb2.Delta) -> None:
    """Append a choice's next tokens to all that it has generated. `to_prior` cleans the result."""
    cached_tokens = output.cached_tokens
    output.MergeFrom(new_tokens)  # runs for every token; appending field by field takes five times as long
    if cached_tokens:
        output.cached_tokens = cached_tokens


def to_prior(output: shard_pb2.Delta) -> shard_pb2.Delta:
    """A choice's output from its first token on, as the `prior` of a later attempt."""
    prior = shard_pb2.Delta()
    prior.CopyFrom(output)
    for field_of_last_delta in ("request_id", "attempt", "index"):
        prior.ClearField(field_of_last_delta)
    return prior


def to_load(load: engine.Load) -> shard_pb2.Load:
    """A replica's load as it goes to a gateway."""
    return shard_pb2.Load(
        running=load.running,
        waiting=load.waiting,
        kv_blocks_free=load.kv_blocks_free,
        kv_blocks_total=load.kv_blocks_total,
        prefix_tokens=load.prefix_tokens,
        prefix_hits=load.prefix_hits,
    )


def to_failed(request_id: str, attempt: int, reason: str, message: str) -> shard_pb2.Failed:
    """An attempt's end by an error. The table of reasons decides whether it is retryable."""
    error = rpc.to_message(PhalanxError(reason, message))
    return shard_pb2.Failed(request_id=request_id, attempt=attempt, error=error)


def _to_position(position: engine.PositionLogprobs) -> types_pb2.PositionLogprobs:
    return types_pb2.PositionLogprobs(chosen=_to_logprob(position.chosen), top=_to_logprobs(position.top))


def _to_logprobs(logprobs: Iterable[engine.TokenLogprob]) -> list[types_pb2.TokenLogprob]:
    return [_to_logprob(logprob) for logprob in logprobs]


def _to_logprob(logprob: engine.TokenLogprob) -> types_pb2.TokenLogprob:
    return types_pb2.TokenLogprob(token_id=logprob.token_id, text=logprob.text, logprob=logprob.logprob)
