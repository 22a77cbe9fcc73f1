"""Samples a token per row on the GPU, as engine/kernels/sample.py defines it, without sorting or the host.

Shapes: S rows, V vocabulary. One Triton program samples one row. The definition sorts; this code searches for
the value of the k-th largest logit, and for the value where the probabilities reach top-p. It bisects the
float32 numbers, mapped to integers of the same order. Each step of the bisection counts the logits at or
above the middle, or sums their probabilities. Equal logits are ordered by their token ids.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from engine.kernels.sample import GREEDY_BELOW, SampleSpec, noise_key

SPEC_INTS = 6  # int32 numbers of one packed SampleSpec
_PACK = struct.Struct("<fffiII")
_INTS = struct.Struct("<6i")
# A larger tile of tokens would spill registers and take long to compile.
MAX_TILE, TILE_PER_WARP = 1 << 13, 512
_BELOW_ALL = tl.constexpr(-0x7F800001)  # an order number below that of minus infinity


def pack(specs: Sequence[SampleSpec]) -> list[int]:
    """Specs as int32 numbers, SPEC_INTS for each row: what `sample` reads."""
    packed: list[int] = []
    for spec in specs:
        sampling, (low, high) = spec.sampling, noise_key(spec)
        temperature = 0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature
        log_min_p = math.log(sampling.min_p) if sampling.min_p else -math.inf
        packed += _INTS.unpack(_PACK.pack(temperature, sampling.top_p, log_min_p, sampling.top_k, low, high))
    return packed


def sample(logits_SV: torch.Tensor, specs_S6: torch.Tensor) -> torch.Tensor:
    """Sample token ids [S] from rows of float32 logits; `specs_S6` is the result of `pack` as int32."""
    S, V = logits_SV.shape
    ids_S = torch.empty(S, dtype=torch.int64, device=logits_SV.device)
    tile = min(MAX_TILE, triton.next_power_of_2(V))
    warps = max(4, tile // TILE_PER_WARP)
    _sample[(S,)](
        logits_SV, specs_S6, ids_S, V, logits_SV.stride(0), INTS=SPEC_INTS, TILE=tile, num_warps=warps
    )
    return ids_S


@triton.jit
def _order(x):
    """Map float32 numbers to int32 numbers of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


@triton.jit
def _mix(x):
    """MurmurHash3's finaliser, as in `engine.kernels.sample`."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _largest(row, V, TILE: tl.constexpr):
    """The largest logit and the first token with it."""
    best, token = float("-inf"), tl.full((), 0, tl.int32)
    for start in range(0, V, TILE):
        ids = start + tl.arange(0, TILE)
        x = tl.load(row + ids, mask=ids < V, other=float("-inf"))
        tile_max = tl.max(x)
        if tile_max > best:
            best, token = tile_max, tl.min(tl.where(x == tile_max, ids, V))
    return best, token


@triton.jit
def _above(row, V, temperature, floor, base, order, TILE: tl.constexpr):
    """Count the scaled logits >= `floor` whose order number is >= `order`, and sum their exp(x - base)."""
    counts, totals = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.float32)
    for start in range(0, V, TILE):
        ids = start + tl.arange(0, TILE)
        x = tl.load(row + ids, mask=ids < V, other=float("-inf")) / temperature
        counted = (ids < V) & (x >= floor) & (_order(x) >= order)
        counts += counted.to(tl.int32)
        totals += tl.where(counted, tl.exp(x - base), 0.0)
    return tl.sum(counts), tl.sum(totals)


@triton.jit
def _sample(logits, specs, out, V, stride, INTS: tl.constexpr, TILE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row, spec = logits + index * stride, specs + index * INTS
    temperature = tl.load(spec).to(tl.float32, bitcast=True)
    largest, token = _largest(row, V, TILE)
    if temperature == 0:
        tl.store(out + index, token.to(tl.int64))
        return
    top_p = tl.load(spec + 1).to(tl.float32, bitcast=True)
    log_min_p = tl.load(spec + 2).to(tl.float32, bitcast=True)
    top_k = tl.load(spec + 3)
    low = tl.load(spec + 4).to(tl.uint32, bitcast=True)
    high = tl.load(spec + 5).to(tl.uint32, bitcast=True)
    base = largest / temperature
    floor = base + log_min_p

    # Candidates are the tokens whose order number is above `last`, and the first `ties` tokens at `last`.
    last, ties = tl.full((), _BELOW_ALL, tl.int32), V
    if (top_k > 0) & (top_k < V):  # bisect for the value of the k-th largest logit
        low_order, high_order = last.to(tl.int64), _order(base).to(tl.int64) + 1
        for _ in range(33):
            middle = (low_order + high_order) // 2
            count, _mass = _above(row, V, temperature, float("-inf"), base, middle, TILE)
            if count >= top_k:
                low_order = middle
            else:
                high_order = middle
        last = low_order.to(tl.int32)
        count, _mass = _above(row, V, temperature, float("-inf"), base, low_order + 1, TILE)
        ties = top_k - count
    if top_p < 1:  # bisect for the value where the mass of the tokens above reaches top-p
        num_above, mass_above = _above(row, V, temperature, floor, base, last.to(tl.int64) + 1, TILE)
        count, mass = _above(row, V, temperature, floor, base, last.to(tl.int64), TILE)
        num_equal = tl.maximum(count - num_above, 1)
        mass = mass_above + (mass - mass_above) * tl.minimum(ties, num_equal) / num_equal
        target = mass * top_p
        low_order, high_order = last.to(tl.int64), _order(base).to(tl.int64) + 1
        for _ in range(33):
            middle = (low_order + high_order) // 2
            _count, mass_from = _above(row, V, temperature, floor, base, middle, TILE)
            if (mass_from >= target) & (middle > low_order):
                low_order = middle
            elif middle > low_order:
                high_order = middle
        num_above, mass_above = _above(row, V, temperature, floor, base, low_order + 1, TILE)
        count, mass_from = _above(row, V, temperature, floor, base, low_order, TILE)
        mass_per_tie = (mass_from - mass_above) / tl.maximum(count - num_above, 1)
        needed = tl.maximum(1, tl.ceil((target - mass_above) / tl.maximum(mass_per_tie, 1e-37)).to(tl.int32))
        ties = tl.where(low_order > last, needed, tl.minimum(ties, needed))
        last = low_order.to(tl.int32)

    best, token = tl.full((), float("-inf"), tl.float64), tl.full((), 0, tl.int32)
    ties_before = 0
    for start in range(0, V, TILE):
        ids = start + tl.arange(0, TILE)
        x = tl.load(row + ids, mask=ids < V, other=float("-inf")) / temperature
        is_tie = (_order(x) == last) & (ids < V)
        rank = ties_before + tl.cumsum(is_tie.to(tl.int32)) - 1
        ties_before += tl.sum(is_tie.to(tl.int32))
        candidate = (ids < V) & (x >= floor) & ((_order(x) > last) | (is_tie & (rank < ties)))
        bits = _mix(_mix(ids.to(tl.uint32) + low) ^ high)
        noise = -tl.log(-tl.log((bits.to(tl.float64) + 0.5) / 4294967296.0))
        score = tl.where(candidate, x.to(tl.float64) + noise, float("-inf"))
        tile_max = tl.max(score)
        if tile_max > best:
            best, token = tile_max, tl.min(tl.where(score == tile_max, ids, V))
    tl.store(out + index, token.to(tl.int64))
