"""One choice of a request as the scheduler sees it, and the order in which choices are served."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter

from engine.grammar.matcher import Matcher
from engine.plan import PENDING_TOKEN, NewSequence
from engine.request import PositionLogprobs, Request

AGING_STEPS = 1024


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request. `computed` tokens have their KV; `slot` is None while it waits.

    `plain`: its tokens are drawn from the logits alone, and nothing but them is asked for.

    `blocks` is its block table. The first `passed` entries are behind the window and no longer held; ranks
    have been told of the first `told`. `digests` names its first full blocks, as far as anybody asked.
    """

    request: Request
    choice: int
    order: tuple[int, int]
    queued: float
    output: list[int]
    prompt_len: int = field(init=False)
    length: int = field(init=False)  # tokens known: prompt and output
    plain: bool = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    passed: int = 0
    told: int = 0
    digests: list[bytes] = field(default_factory=list)
    slot: int | None = None
    in_flight: int = 0  # tokens that plans in flight compute
    drawing: int = 0  # tokens that they draw
    step: int = 0  # of the last plan that it is in
    cached_tokens: int = 0  # prompt tokens that were computed when it first ran
    scheduled: float | None = None
    first_token: float | None = None
    matcher: Matcher | None = None
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.request.prompt_ids)
        self.length = self.prompt_len + len(self.output)
        asked = self.request
        self.plain = (
            asked.logprobs is None
            and asked.prompt_logprobs is None
            and not asked.sampling.has_logits_processors
        )

    @property
    def remaining(self) -> int:
        """Tokens known whose KV is not computed; 1 while it decodes."""
        return self.length - self.computed

    @property
    def planned(self) -> int:
        """Tokens whose KV is computed once the plans in flight have run."""
        return self.computed + self.in_flight

    @property
    def unplanned(self) -> int:
        """Tokens that no plan computes yet, with those being drawn, as far as it is to go on after them."""
        if self.drawing and len(self.output) + self.drawing >= self.request.max_tokens:
            return 0
        return self.length + self.drawing - self.planned

    @property
    def held(self) -> list[int]:
        """The blocks that it holds."""
        return self.blocks[self.passed :]

    @property
    def scores_prompt(self) -> bool:
        """Whether its whole prompt must be computed for the log-probabilities of its tokens."""
        return self.request.prompt_logprobs is not None and self.choice == 0 and not self.output

    def append(self, token: int) -> None:
        """Take in a token that was drawn."""
        self.output.append(token)
        self.length += 1
        if self.matcher is not None:
            self.matcher.accept(token)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """The tokens at positions `start` to `end`; PENDING_TOKEN for one that is being drawn."""
        if end > self.length:
            return (*self.tokens(start, self.length), PENDING_TOKEN)
        prompt = self.request.prompt_ids
        split = len(prompt)
        if start >= split:
            return tuple(self.output[start - split : end - split])
        return prompt[start:end] + tuple(self.output[: max(end - split, 0)])


def place_in_order(priority: int, step: int, arrival: int) -> tuple[int, int]:
    """Where a sequence stands among all others, for as long as it lives; the least is served first.

    Lower priorities go first, but a step of waiting counts: a sequence of priority p stands where one of
    priority 0 would that arrived `p * AGING_STEPS` steps later. So whatever comes after that stands behind
    it, and since the first in order always goes on, everyone gets to its end.
    """
    return step + priority * AGING_STEPS, arrival


_ORDER = attrgetter("order")


class InOrder:
    """Sequences, the first in order first."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._sequences)

    @property
    def first(self) -> Sequence:
        """The first of them; there is one."""
        return self._sequences[0]

    @property
    def last(self) -> Sequence:
        """The last of them; there is one."""
        return self._sequences[-1]

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into its place."""
        insort(self._sequences, sequence, key=_ORDER)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is in."""
        index = bisect_left(self._sequences, sequence.order, key=_ORDER)
        if index == len(self._sequences) or self._sequences[index] is not sequence:
            raise ValueError("the sequence is not here")
        del self._sequences[index]


def new_sequence(
    request: Request, choice: int, output: Iterable[int], slot: int, eos: Iterable[int]
) -> NewSequence:
    """What ranks must know of a choice that takes a slot, with the `output` that it has by now.

    Log-probabilities of the prompt come with the first choice's first token: while it has none, it must
    compute its whole prompt, also where a cache holds some of it.
    """
    sampling = request.sampling
    output = tuple(output)
    prompt_logprobs = request.prompt_logprobs if choice == 0 and not output else None
    needs_prompt = sampling.repetition_penalty != 1 or prompt_logprobs is not None
    needs_output = bool(
        sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.bad_words
    )
    ends = set(request.stop_token_ids) | (set() if request.ignore_eos else set(eos))
    return NewSequence(
        slot,
        len(request.prompt_ids),
        choice,
        replace(sampling, grammar=None) if sampling.grammar else sampling,
        request.logprobs,
        prompt_logprobs,
        request.prompt_ids if needs_prompt else (),
        output if needs_output else (),
        tuple(sorted(ends)) if sampling.min_tokens else (),
    )
