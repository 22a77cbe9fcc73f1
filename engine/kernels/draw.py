"""Which token a row of logits draws: the definition, in torch.

Shapes: S rows, V vocabulary.

Tokens are drawn by the Gumbel-max trick (Gumbel 1954): the largest of logits / temperature + noise. The
noise of a token is a hash of (seed, choice, output position) and the token's id, computed in integers,
so it is the same on every device and in every batch, and a replayed request draws what the lost attempt
would have drawn. It has 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.request import SamplingParams

GREEDY_BELOW = 1e-5  # of temperature
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is drawn: `position` is the output position of the new token."""

    sampling: SamplingParams
    choice: int
    position: int
    logprobs: int | None = None
    slot: int = 0


def draw_tokens(logits_SV: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The token ids drawn, [S]."""
    token_ids_S = logits_SV.argmax(-1)
    random = [row for row, draw in enumerate(draws) if draw.sampling.temperature >= GREEDY_BELOW]
    if random:
        rows = torch.tensor(random, device=logits_SV.device)
        chosen = [draws[row] for row in random]
        scores = truncate(logits_SV[rows], [draw.sampling for draw in chosen])
        token_ids_S[rows] = (scores.double() + gumbel(chosen, scores.shape[1], scores.device)).argmax(-1)
    return token_ids_S


def truncate(logits_SV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Logits over temperature, minus infinity where top-k, then top-p of what is left, or min-p drop it.

    The most likely token always stays.
    """
    device = logits_SV.device

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    scaled_SV = logits_SV / column([p.temperature for p in params])
    if any(p.min_p > 0 for p in params):
        log_min_p = column([p.min_p for p in params]).log()
        drop_SV = scaled_SV < scaled_SV.amax(-1, keepdim=True) + log_min_p
        scaled_SV = scaled_SV.masked_fill(drop_SV, -torch.inf)
    if all(p.top_k == 0 and p.top_p == 1 for p in params):
        return scaled_SV
    # min-p only cuts the tail of the sorted order, so that it may come first.
    sorted_SV, order_SV = scaled_SV.sort(dim=-1, descending=True, stable=True)
    vocab = scaled_SV.shape[1]
    top_k_S1 = torch.tensor([p.top_k or vocab for p in params], device=device)[:, None]
    sorted_SV.masked_fill_(torch.arange(vocab, device=device)[None] >= top_k_S1, -torch.inf)
    probs_SV = sorted_SV.softmax(-1)
    before_SV = probs_SV.cumsum(-1) - probs_SV
    drop_SV = before_SV >= column([p.top_p for p in params])
    drop_SV &= column([p.top_p for p in params]) < 1
    drop_SV[:, 0] = False
    sorted_SV.masked_fill_(drop_SV, -torch.inf)
    return torch.empty_like(scaled_SV).scatter_(1, order_SV, sorted_SV)


def gumbel(draws: Sequence[Draw], vocab: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise [S, V] in float64, keyed by each row's draw and the vocabulary index."""
    keys = [noise_key(draw) for draw in draws]
    low_S1, high_S1 = (
        torch.tensor([part[i] for part in keys], dtype=torch.int64, device=device)[:, None] for i in (0, 1)
    )
    ids_1V = torch.arange(vocab, dtype=torch.int64, device=device)[None]
    bits_SV = _mix32(_mix32((ids_1V + low_S1) & _MASK32) ^ high_S1)
    uniform_SV = (bits_SV.double() + 0.5) / 2**32  # strictly between 0 and 1
    return -torch.log(-torch.log(uniform_SV))


def noise_key(draw: Draw) -> tuple[int, int]:
    """Two 32-bit words of a hash of (seed, choice, position)."""
    key = _mix64(draw.sampling.seed)
    key = _mix64(key ^ draw.choice)
    key = _mix64(key ^ draw.position)
    return key & _MASK32, key >> 32


def _mix64(x: int) -> int:
    """SplitMix64 (Steele et al. 2014): a step of the sequence, then its finaliser."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser on int64 elements; products may wrap, their low 32 bits are right."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)
