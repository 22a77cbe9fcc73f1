"""How many tokens the next step takes, and how many of them for prompts."""

from __future__ import annotations

from dataclasses import dataclass

from engine.scheduling.validation import Limits


@dataclass(frozen=True, slots=True)
class Demand:
    """What there is to compute.

    decodes: sequences that compute one token at a time. prompts: sequences that have more to compute,
    running or waiting; `resumed` of them have output, and were replayed or preempted. Of the tokens of these,
    `prompt_tokens` could be computed by now in all, `ready` of them by the next plan, and `in_flight` are in
    plans in flight.
    """

    decodes: int
    prompts: int
    prompt_tokens: int
    ready: int
    in_flight: int = 0
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """Tokens of a plan, and how many of them at most are of prompts. The rest is for decodes."""

    tokens: int
    prompt_tokens: int


def prompt_budget(limits: Limits, depth: int, decodes: int, waiting: int, resumed: int = 0) -> int:
    """Prompt tokens that a round of `depth` plans may compute beside its decodes.

    A plan costs what its tokens cost, and as much as `weight_tokens` tokens for reading the weights. While
    anybody decodes, the time of a round is divided between those who decode and those who wait for their
    next token, by heads, but half of it at least goes to the prompts: a lone prompt stretches steps to twice
    their time, hundreds of prompts take whole steps, since then most wait. A prompt's token costs less than a
    decode's, which needs logits as well, so that the decodes get rather more.

    Steps are whole as long as somebody is `resumed`: its client waits in the middle of an answer, and for all
    of these tokens, where those who decode wait for one longer step at a time.
    """
    most = depth * limits.max_batch_tokens
    if limits.max_prefill_tokens and decodes:
        return min(most, depth * limits.max_prefill_tokens)
    if decodes == 0 or resumed:
        return most
    return min(most, (depth * limits.weight_tokens + decodes) * max(waiting, decodes) // decodes)


def share_of(limits: Limits, depth: int, demand: Demand) -> Share:
    """The next plan's share of a round, when up to `depth` plans are in flight.

    The plans of a round get equally many tokens, or the stages of a pipeline would wait for the longest.
    Within one plan decodes come first; in a round, a prompt may have a plan of its own.
    """
    room = max(0, depth * limits.max_batch_tokens - demand.decodes)
    budget = prompt_budget(limits, depth, demand.decodes, demand.prompts, demand.resumed)
    prompts = min(room, demand.prompt_tokens, budget)
    plans = max(1, min(depth, demand.decodes + demand.prompts))
    tokens = min(limits.max_batch_tokens, -(-(demand.decodes + prompts) // plans))
    return Share(tokens, max(0, min(tokens, demand.ready, prompts - demand.in_flight)))
