"""One choice of a request, as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from engine.grammar.matcher import Matcher
from engine.plan import PENDING_TOKEN
from engine.request import Delta, FinishReason, PositionLogprobs, Request, Timing


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request: its tokens are the prompt, prior output and new output, in this order.

    A sequence that runs has a slot and a block table, `blocks`. A preempted sequence loses both, and its
    computed tokens with them; it keeps its output. Entry i of `blocks` is for the tokens from position
    i * block_size on. So the first `num_blocks_out_of_window` entries stay, although those blocks are
    released.

    With `can_sample_on_device`, sampling needs only the logits, and the client gets only tokens. So the next
    step can be planned before the host knows the sampled token.
    """

    request: Request
    choice: int
    order: tuple[int, int]  # its place in priority order
    queued_at: float
    output_ids: list[int]
    prompt_len: int = field(init=False)
    num_tokens: int = field(init=False)  # known tokens: prompt and output
    can_sample_on_device: bool = field(init=False)
    num_computed_tokens: int = 0  # tokens whose KV is in `blocks`
    blocks: list[int] = field(default_factory=list)
    num_blocks_out_of_window: int = 0
    num_blocks_sent: int = 0  # entries of `blocks` that earlier plans have sent to the ranks
    block_hashes: list[bytes] = field(default_factory=list)  # of its first full blocks, computed when needed
    slot: int | None = None  # None while the sequence waits
    num_tokens_in_flight: int = 0  # tokens that the plans in flight compute
    num_pending_tokens: int = 0  # tokens that the plans in flight sample
    last_planned_step: int = 0
    num_cached_tokens: int = 0  # prompt tokens that were cached when the sequence first ran
    scheduled_at: float | None = None
    first_token_at: float | None = None
    matcher: Matcher | None = None
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        request = self.request
        self.prompt_len = len(request.prompt_ids)
        self.num_tokens = self.prompt_len + len(self.output_ids)
        asks_logprobs = request.logprobs is not None or request.prompt_logprobs is not None
        self.can_sample_on_device = not asks_logprobs and not request.sampling.has_logits_processors

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose KV is not computed yet; 1 while the sequence decodes."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_planned_tokens(self) -> int:
        """Tokens whose KV is computed once the plans in flight have run."""
        return self.num_computed_tokens + self.num_tokens_in_flight

    @property
    def num_unplanned_tokens(self) -> int:
        """Tokens that the next plan may compute, pending tokens included.

        It is 0 if the pending token is the last one that `max_tokens` allows.
        """
        pending = self.num_pending_tokens
        if pending and len(self.output_ids) + pending >= self.request.max_tokens:
            return 0
        return self.num_tokens + pending - self.num_computed_tokens - self.num_tokens_in_flight

    @property
    def referenced_blocks(self) -> list[int]:
        """The blocks that the sequence has a reference to."""
        return self.blocks[self.num_blocks_out_of_window :]

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether its whole prompt must be computed, for the log-probabilities of the prompt's tokens."""
        return self.request.prompt_logprobs is not None and self.choice == 0 and not self.output_ids

    def append(
        self, token_id: int, logprobs: PositionLogprobs | None, now: float, eos_token_ids: Collection[int]
    ) -> Delta:
        """Add a sampled token; returns the delta for the client, which also says whether the sequence ends.

        The delta of an attempt's first token also has the prompt's cached tokens and log-probabilities.
        """
        index = len(self.output_ids)
        self.output_ids.append(token_id)
        self.num_tokens += 1
        if self.matcher is not None:
            self.matcher.accept(token_id)
        prompt_logprobs: tuple[PositionLogprobs, ...] = ()
        cached_tokens = 0
        if self.first_token_at is None:
            self.first_token_at = now
            cached_tokens = self.num_cached_tokens
            prompt_logprobs = tuple(self.prompt_logprobs)
            self.prompt_logprobs.clear()
        timing = None
        finish = self.finish_reason(eos_token_ids)
        if finish:
            scheduled_at = now if self.scheduled_at is None else self.scheduled_at
            timing = Timing(self.queued_at, scheduled_at, self.first_token_at, now)
        return Delta(
            self.request.id,
            self.choice,
            index,
            (token_id,),
            (),
            () if logprobs is None else (logprobs,),
            finish,
            timing,
            prompt_logprobs,
            cached_tokens,
        )

    def token_ids(self, start: int, end: int) -> tuple[int, ...]:
        """The tokens at positions `start` to `end` - 1; PENDING_TOKEN for one that is not known yet."""
        if end > self.num_tokens:
            return (*self.token_ids(start, self.num_tokens), PENDING_TOKEN)
        split = self.prompt_len
        if start >= split:
            return tuple(self.output_ids[start - split : end - split])
        return self.request.prompt_ids[start:end] + tuple(self.output_ids[: max(end - split, 0)])

    def finish_reason(self, eos_token_ids: Collection[int]) -> FinishReason | None:
        """Why the sequence ends with its last output token; None if it continues."""
        request, last = self.request, self.output_ids[-1]
        if last in request.stop_token_ids:
            return "stop"
        if last in eos_token_ids and not request.ignore_eos:
            return "stop"
        if self.matcher is not None and self.matcher.finish is not None:
            return self.matcher.finish
        return "length" if len(self.output_ids) >= request.max_tokens else None
