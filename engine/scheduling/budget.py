"""The token budget of a step: how many tokens it computes, and how many of them are prompt tokens.

The budget decides how large the chunks of a prompt are. `Scheduler._schedule_running` cuts them.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.scheduling.demand import Demand
from engine.scheduling.limits import Limits


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """Tokens of one plan, at most. Up to `prompt_tokens` of them are for prompts, the rest is for decodes."""

    tokens: int
    prompt_tokens: int


def prompt_budget(
    limits: Limits, depth: int, num_decodes: int, num_prompts: int, num_resumed: int = 0
) -> int:
    """Prompt tokens that a round of `depth` plans may compute beside its decodes.

    A plan costs one unit per token, and `weight_tokens` units for reading the weights. While sequences
    decode, the time of a round is divided between decodes and prompts proportionally to the number of
    sequences, but prompts get at least half. So one prompt at most doubles the time of a step, and hundreds
    of prompts get whole steps. A prompt token costs less than a decode, which needs logits too, so in
    practice decodes get rather more than their part.

    A resumed prompt gets whole steps: its client waits in the middle of an answer, for all of the prompt's
    tokens, while each client of a decode waits for one longer step at a time.
    """
    max_tokens = depth * limits.max_batch_tokens
    if limits.max_prefill_tokens and num_decodes:
        return min(max_tokens, depth * limits.max_prefill_tokens)
    if num_decodes == 0 or num_resumed:
        return max_tokens
    round_cost = depth * limits.weight_tokens + num_decodes
    return min(max_tokens, round_cost * max(num_prompts, num_decodes) // num_decodes)


def next_budget(limits: Limits, depth: int, demand: Demand) -> TokenBudget:
    """The next plan's part of a round, where up to `depth` plans are in flight.

    All plans of a round get the same number of tokens, else the stages of a pipeline wait for the longest
    plan. Decodes come first within a plan, but within a round a prompt may have a plan of its own.
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
