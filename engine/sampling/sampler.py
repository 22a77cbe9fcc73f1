"""Draws the next token of every row of a step, by the rules of its request, and tells how likely it was.

Shapes: S rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.kernels.draw import Draw
from engine.kernels.transfer import from_device
from engine.plan import PromptLogprobs, Sampled, StepPlan
from engine.request import PositionLogprobs, TokenLogprob
from engine.sampling.logits_processors import Rules

Drawn = Callable[[], Sampled]
"""What a step draws, perhaps still on its way from the device: the call waits for it."""
DrawTokens = Callable[[torch.Tensor, Sequence[Draw]], torch.Tensor]  # logits [S, V] to ids [S]

_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of a step whose logits tell how likely the prompt's next tokens were.

    `row` is the number of the plan's row; the token after the step's row `first` + i is `targets[i]`.
    """

    row: int
    first: int
    targets: tuple[int, ...]
    logprobs: int


class Sampler:
    """Draws for one epoch's plans, in order.

    Owns: what drawing depends on beside logits. Does not own: the model, the plans, the draw itself.
    """

    def __init__(self, draw: DrawTokens) -> None:
        self._draw = draw
        self._rules = Rules()

    def follow(self, plan: StepPlan) -> None:
        """Take in who leaves and who joins; comes before `sample`, for every plan."""
        self._rules.follow(plan)

    def sample(
        self,
        plan: StepPlan,
        logits_SV: torch.Tensor | None,
        draws: Sequence[Draw],
        ids_S: torch.Tensor | None = None,
        prompt_logprobs: tuple[PromptLogprobs, ...] = (),
    ) -> Drawn:
        """Draw one token per row of float32 logits; log-probabilities are of the logits as they are.

        `ids_S` are the tokens that the logits draw as they are, where that is known already.
        """
        if logits_SV is None:
            return _at_hand(Sampled(plan.step, (), (), prompt_logprobs))
        if plan.sample_on_device:  # nobody in it has rules
            assert ids_S is not None
            count, wait = len(ids_S), from_device(ids_S)
            return lambda: Sampled(plan.step, tuple(wait()), (None,) * count)
        rows = [(draw.slot, draw.position) for draw in draws]
        ruled_SV = self._rules.apply(logits_SV, rows, plan.masks)
        if ids_S is None or ruled_SV is not logits_SV:
            ids_S = self._draw(ruled_SV, draws)
        token_ids = tuple(ids_S.tolist())
        for draw, token in zip(draws, token_ids, strict=True):
            self._rules.drawn(draw.slot, token)
        logprobs = log_probabilities(logits_SV, ids_S, [draw.logprobs for draw in draws])
        return _at_hand(Sampled(plan.step, token_ids, logprobs, prompt_logprobs))


def _at_hand(sampled: Sampled) -> Drawn:
    """What nobody has to wait for."""
    return lambda: sampled


def score_prompts(
    prompts: Sequence[PromptRows], logits: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[PromptLogprobs, ...]:
    """Log-probabilities of prompt tokens.

    Args:
        prompts: what to score.
        logits: float32 logits [S, V] of the step's rows [S]. Called for a few rows at a time, so that
            memory does not grow with the prompt; every tensor parallel rank makes the same calls.
    """
    scored = []
    for prompt in prompts:
        positions: list[PositionLogprobs] = []
        for start in range(0, len(prompt.targets), _ROWS_AT_ONCE):
            targets_S = torch.tensor(prompt.targets[start : start + _ROWS_AT_ONCE])
            first = prompt.first + start
            logits_SV = logits(torch.arange(first, first + len(targets_S)))
            wanted = [prompt.logprobs] * len(targets_S)
            entries = log_probabilities(logits_SV, targets_S.to(logits_SV.device), wanted)
            positions.extend(entry for entry in entries if entry is not None)
        scored.append(PromptLogprobs(prompt.row, tuple(positions)))
    return tuple(scored)


def log_probabilities(
    logits_SV: torch.Tensor, token_ids_S: torch.Tensor, wanted: Sequence[int | None]
) -> tuple[PositionLogprobs | None, ...]:
    """Log-probabilities of tokens by the logits as they are, before any rule, temperature and truncation.

    Args:
        logits_SV: float32.
        token_ids_S: a token per row.
        wanted: how many alternatives per row; None for a row that wants nothing.
    """
    chosen_rows = [row for row, count in enumerate(wanted) if count is not None]
    result: list[PositionLogprobs | None] = [None] * len(wanted)
    if not chosen_rows:
        return tuple(result)
    rows = torch.tensor(chosen_rows, device=logits_SV.device)
    logprobs_SV = torch.log_softmax(logits_SV[rows], -1)
    tokens_S = token_ids_S[rows]
    most = min(max(wanted[row] or 0 for row in chosen_rows), logits_SV.shape[1])
    top = logprobs_SV.topk(most, dim=-1)
    tokens, chosen = tokens_S.tolist(), logprobs_SV.gather(1, tokens_S[:, None])[:, 0].tolist()
    for row, token, logprob, ids, values in zip(
        chosen_rows, tokens, chosen, top.indices.tolist(), top.values.tolist(), strict=True
    ):
        best = tuple(map(TokenLogprob, ids[: wanted[row]], values[: wanted[row]]))
        result[row] = PositionLogprobs(TokenLogprob(token, logprob), best)
    return tuple(result)
