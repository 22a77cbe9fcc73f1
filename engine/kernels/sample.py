"""How a token is sampled from a row of logits: the definition, in torch.

Every other implementation must sample the same token: C++ (sample.cpp) and Triton (gpu/sample.py).

Shapes: S rows, V vocabulary.

Sampling is the Gumbel-max trick (Gumbel 1954): argmax(logits / temperature + noise). The noise of a token
is an integer hash of (seed, choice, output position) and the token's id. So the noise is the same on every
device and in every batch, and a replayed request samples the tokens that the lost attempt would have
sampled. The hash has 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.request import SamplingParams

GREEDY_BELOW = 1e-5  # a lower temperature means greedy
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How one row is sampled: `position` is the output position of the new token."""

    sampling: SamplingParams
    choice: int
    position: int
    logprobs: int | None = None
    slot: int = 0


def sample_tokens(logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """Sample one token id per row, [S]."""
    token_ids_S = logits_SV.argmax(-1)
    random_rows = [row for row, spec in enumerate(specs) if spec.sampling.temperature >= GREEDY_BELOW]
    if random_rows:
        rows = torch.tensor(random_rows, device=logits_SV.device)
        random_specs = [specs[row] for row in random_rows]
        scores = truncate(logits_SV[rows], [spec.sampling for spec in random_specs])
        noise = gumbel(random_specs, scores.shape[1], scores.device)
        token_ids_S[rows] = (scores.double() + noise).argmax(-1)
    return token_ids_S


def truncate(logits_SV: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Divide logits by the temperature, and set the ones that min-p, top-k or top-p exclude to -infinity.

    Top-p applies to the tokens that top-k leaves. The most likely token is never excluded.
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
    # Top-k and top-p cut in sorted order. Min-p needs no sort, because it cuts at a value.
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


def gumbel(specs: Sequence[SampleSpec], vocab: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise [S, V] in float64, keyed by each row's `noise_key` and the token id."""
    keys = [noise_key(spec) for spec in specs]
    low_S1, high_S1 = (
        torch.tensor([key[word] for key in keys], dtype=torch.int64, device=device)[:, None]
        for word in (0, 1)
    )
    ids_1V = torch.arange(vocab, dtype=torch.int64, device=device)[None]
    bits_SV = _mix32(_mix32((ids_1V + low_S1) & _MASK32) ^ high_S1)
    uniform_SV = (bits_SV.double() + 0.5) / 2**32  # strictly between 0 and 1
    return -torch.log(-torch.log(uniform_SV))


def noise_key(spec: SampleSpec) -> tuple[int, int]:
    """A 64-bit hash of (seed, choice, position) as two 32-bit words, the low one first."""
    key = _mix64(spec.sampling.seed)
    key = _mix64(key ^ spec.choice)
    key = _mix64(key ^ spec.position)
    return key & _MASK32, key >> 32


def _mix64(x: int) -> int:
    """SplitMix64 (Steele et al. 2014): a step of the sequence, then its finaliser."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser on int64 elements. A product may overflow; its low 32 bits are right."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)
