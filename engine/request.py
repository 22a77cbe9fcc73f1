"""Requests to the engine and its answers. Plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
GrammarKind = Literal["json_schema", "json_object", "regex", "choice"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar that the whole output must match.

    `source` is a JSON Schema, a regular expression, or a JSON array of the texts to choose from. For
    `json_object`, which allows any JSON object, it is empty.
    """

    kind: GrammarKind
    source: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is sampled.

    Noise is keyed by (seed, choice, output position) and by nothing else. So a replayed request samples the
    tokens that the lost attempt would have sampled. Output of earlier attempts (`Request.prior`) counts as
    output everywhere.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # 0 <= seed < 2**64
    # Divides positive logits and multiplies negative logits of prompt and output tokens.
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # subtracted once from the logits of output tokens
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, value added to its logit)
    min_tokens: int = 0  # with fewer output tokens, no end of sequence, stop id or stop text ends the output
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of ids that the output must not contain
    grammar: Grammar | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def has_logits_processors(self) -> bool:
        """Whether anything changes the logits before temperature and truncation do."""
        return self.has_penalties or bool(
            self.logit_bias or self.min_tokens or self.bad_words or self.grammar is not None
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and how to complete it `n` times.

    `prior` has, per choice, the tokens that earlier attempts generated. They are output, not prompt: output
    positions, `max_tokens` and noise continue from them. `finished` marks choices that have ended.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    max_tokens: int = 16  # 0: as many as fit
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prior: tuple[tuple[int, ...], ...] = ()
    finished: tuple[bool, ...] = ()
    prompt_logprobs: int | None = None  # alternatives beside each prompt token; None: no log-probabilities
    priority: int = 0  # lower is served earlier


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with the natural logarithm of its probability; the text process fills `text`."""

    token_id: int
    logprob: float
    text: str = ""


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Log-probabilities at one output position, before temperature and truncation."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """When a choice reached each milestone, in seconds since the Unix epoch."""

    queued: float
    scheduled: float
    first_token: float
    finished: float


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice. `index` is the output position of the first one, prior output included.

    - `pieces`: the text that each token completes, one entry per token. The engine leaves it empty; the text
      process fills it.
    - `finish`, `timing`: come with the last token of the choice.
    - `prompt_logprobs`: one entry per prompt token after the first; come with the first token of choice 0.
    - `cached_tokens`: the number of prompt tokens whose KV was computed already, for another request or
      choice; comes with the first token that an attempt generates for the choice.
    """

    id: str
    choice: int
    index: int
    token_ids: tuple[int, ...]
    pieces: tuple[str, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish: FinishReason | None = None
    timing: Timing | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that ended with an error."""

    id: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a replica is.

    - `running`, `waiting`: choices.
    - `kv_blocks_free`: KV blocks that can be allocated, free or evictable, of `kv_blocks_total`.
    - `prefix_tokens`: prompt tokens looked up in the prefix cache since the start; `prefix_hits` of them were
      cached.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    prefix_tokens: int = 0
    prefix_hits: int = 0
