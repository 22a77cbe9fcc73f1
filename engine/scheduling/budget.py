"""The token budget of a step: how many tokens it computes, and how many of them are prompt tokens.

The budget limits how large the chunks of a prompt are. The scheduler cuts them, in
engine/scheduling/scheduler.py (`Scheduler._schedule_running`).
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.scheduling.demand import Demand
from engine.scheduling.limits import Limits


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """The maximum tokens of one plan: `prompt_tokens` of them for prompts, the rest for decodes."""

    tokens: int
    prompt_tokens: int


def prompt_budget(
    limits: Limits, depth: int, num_decodes: int, num_prompts: int, num_resumed: int = 0
) -> int:
    """Prompt tokens that a round of `depth` plans may compute beside its decodes.

    A plan costs one unit per token, and `weight_tokens` units for reading the weights. While sequences
    decode, the time of a round is divided between decodes and prompts proportionally to the number of
    sequences, but prompts get at least half. So one prompt at most doubles the time of a step, and hundreds
    of prompts get whole steps. In practice decodes get more than their share, because they also need logits
    and so cost more than prompt tokens.

    A resumed prompt gets whole steps. Its client waits in the middle of an answer until the whole prompt is
    computed. The client of a decode waits only for one longer step at a time.
    """
    max_tokens = depth * limits.max_batch_tokens
    if limits.max_prefill_tokens and num_decodes:
        return min(max_tokens, depth * limits.max_prefill_tokens)
    if num_decodes == 0 or num_resumed:
        return max_tokens
    round_cost = depth * limits.weight_tokens + num_decodes
    return min(max_tokens, round_cost * max(num_prompts, num_decodes) // num_decodes)


def next_budget(limits: Limits, depth: int, demand: Demand) -> TokenBudget:
    """The budget of the next plan. A round has `depth` plans: as many as may be in flight.

    All plans of a round get the same number of tokens, else the stages of a pipeline wait for the longest
    plan. Within a plan decodes come first. Within a round, one plan may contain nothing but a prompt.
    """
    free_tokens = max(0, depth * limits.max_batch_tokens - demand.num_decodes)
    prompt_tokens = min(
        free_tokens,
        demand.num_prompt_tokens,
        prompt_budget(limits, depth, demand.num_decodes, demand.num_prompts, demand.num_resumed),
    )
    plans = max(1, min(depth, demand.num_decodes + demand.num_prompts))
    tokens = min(limits.max_batch_tokens, -(-(demand.num_decodes + prompt_tokens) // plans))
    unplanned = prompt_tokens - demand.num_tokens_in_flight
    return TokenBudget(tokens, max(0, min(tokens, demand.num_ready_tokens, unplanned)))
