"""Log-probabilities of sampled tokens and of prompt tokens, from the model's unchanged logits.

Shapes: S rows, V vocabulary. Logits processors, temperature and truncation do not change them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.plan import PromptLogprobs
from engine.request import PositionLogprobs, TokenLogprob

_MAX_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of a step whose logits give the log-probabilities of a prompt's next tokens.

    `chunk` is the index of the plan's chunk. Row `first_row` + i of the step gives the log-probability of the
    token `targets[i]`. `logprobs` is the number of alternatives for each.
    """

    chunk: int
    first_row: int
    targets: tuple[int, ...]
    logprobs: int


def score_prompts(
    prompts: Sequence[PromptRows], logits: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[PromptLogprobs, ...]:
    """Log-probabilities of prompt tokens.

    Args:
        prompts: the rows to score.
        logits: computes float32 logits [S, V] of some of the step's rows [S]. It is called for a few rows at
            a time, so that memory does not grow with the prompt. Each call is a collective: every tensor
            parallel rank must make the same calls.
    """
    scored = []
    for prompt in prompts:
        positions: list[PositionLogprobs] = []
        for start in range(0, len(prompt.targets), _MAX_ROWS_AT_ONCE):
            targets_S = torch.tensor(prompt.targets[start : start + _MAX_ROWS_AT_ONCE])
            first_row = prompt.first_row + start
            logits_SV = logits(torch.arange(first_row, first_row + len(targets_S)))
            wanted = [prompt.logprobs] * len(targets_S)
            entries = log_probabilities(logits_SV, targets_S.to(logits_SV.device), wanted)
            positions.extend(entry for entry in entries if entry is not None)
        scored.append(PromptLogprobs(prompt.chunk, tuple(positions)))
    return tuple(scored)


def log_probabilities(
    logits_SV: torch.Tensor, token_ids_S: torch.Tensor, wanted: Sequence[int | None]
) -> tuple[PositionLogprobs | None, ...]:
    """The log-probability of one token per row, and of the row's most likely tokens.

    Args:
        logits_SV: float32, as the model computes them.
        token_ids_S: a token per row.
        wanted: the number of most likely tokens per row; None for a row without log-probabilities.
    """
    wanted_rows = [row for row, count in enumerate(wanted) if count is not None]
    result: list[PositionLogprobs | None] = [None] * len(wanted)
    if not wanted_rows:
        return tuple(result)
    rows = torch.tensor(wanted_rows, device=logits_SV.device)
    logprobs_SV = torch.log_softmax(logits_SV[rows], -1)
    tokens_S = token_ids_S[rows]
    max_top = min(max(wanted[row] or 0 for row in wanted_rows), logits_SV.shape[1])
    top = logprobs_SV.topk(max_top, dim=-1)
    tokens, chosen = tokens_S.tolist(), logprobs_SV.gather(1, tokens_S[:, None])[:, 0].tolist()
    for row, token, logprob, top_ids, top_values in zip(
        wanted_rows, tokens, chosen, top.indices.tolist(), top.values.tolist(), strict=True
    ):
        best = tuple(map(TokenLogprob, top_ids[: wanted[row]], top_values[: wanted[row]]))
        result[row] = PositionLogprobs(TokenLogprob(token, logprob), best)
    return tuple(result)
