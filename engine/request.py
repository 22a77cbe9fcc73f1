"""What is asked of the engine and what it answers. Plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
GrammarKind = Literal["json_schema", "json_object", "regex", "choice"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the output must match, from its first token to its last.

    `source` is a JSON Schema, a regular expression, or a JSON array of the texts to choose from; for
    `json_object`, any JSON object, it is empty.
    """

    kind: GrammarKind
    source: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn.

    Noise is keyed by (seed, choice, output position) and by nothing else, so that a replayed
    request draws what the lost attempt would have drawn. `prior` output counts as output everywhere.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # 0 <= seed < 2**64
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens seen at all
    presence_penalty: float = 0.0  # taken once from the logits of tokens in the output
    frequency_penalty: float = 0.0  # taken from them once per occurrence
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    min_tokens: int = 0  # output tokens before end-of-sequence, stop ids and stop texts count
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of ids that the output must not contain
    grammar: Grammar | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that have come before change the logits."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def has_logits_processors(self) -> bool:
        """Whether anything changes the logits before temperature and truncation do."""
        return self.has_penalties or bool(
            self.logit_bias or self.min_tokens or self.bad_words or self.grammar is not None
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to complete it, `n` times over.

    `prior` holds, per choice, what earlier attempts generated: it is output, not prompt, so output
    positions, `max_tokens` and noise go on from it. `finished` marks choices that have ended.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    max_tokens: int = 16  # 0 is as many as fit
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prior: tuple[tuple[int, ...], ...] = ()
    finished: tuple[bool, ...] = ()
    prompt_logprobs: int | None = None  # alternatives beside each prompt token, None for no such thing
    priority: int = 0  # lower is served earlier


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with the natural logarithm of its probability; `text` is filled by the text process."""

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
    """When a choice passed its milestones, in seconds since the Unix epoch."""

    queued: float
    scheduled: float
    first_token: float
    finished: float


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice. `index` is the output position of the first, prior output included.

    `pieces` is the text that each token completed (one entry per token); the engine leaves it empty
    and the text process fills it. `finish` and `timing` come with the choice's last token,
    `prompt_logprobs`, one entry per prompt token after the first, with the first choice's first.
    `cached_tokens` comes with an attempt's first token of each choice: how many tokens of the prompt were
    computed already, for other requests or another choice.
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
    """How busy a replica is: choices running and waiting, KV blocks free or kept as cache, and in all.

    Of `prefix_tokens` prompt tokens looked up in the prefix cache since the start, `prefix_hits` were there.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    prefix_tokens: int = 0
    prefix_hits: int = 0
