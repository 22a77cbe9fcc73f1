"""Draws a token of every row on the GPU, as `kernels/draw.py` defines it, without sorting and the host.

Shapes: S rows, V vocabulary. A program has a row. Where the definition sorts, it searches: the value of the
k-th largest logit, or of the one at which the probabilities reach top-p, is found bit by bit among the
float32 numbers in their order, each time counting or summing what is not below. Equal logits stay in the
order of their tokens' numbers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from engine.kernels.draw import GREEDY_BELOW, Draw, noise_key

ROW = 6  # numbers of 32 bits that say how a row is drawn
_PACK = struct.Struct("<fffiII")
_INTS = struct.Struct("<6i")
MOST_TILE, TILE_OF_WARP = 1 << 13, 512  # more tokens at a time spill registers, and take long to compile
_BELOW_ALL = tl.constexpr(-0x7F800001)  # the place of a number below minus infinity


def pack(draws: Sequence[Draw]) -> list[int]:
    """How rows are drawn, as 32-bit integers, ROW of them each."""
    packed: list[int] = []
    for draw in draws:
        sampling, (low, high) = draw.sampling, noise_key(draw)
        temperature = 0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature
        log_min_p = math.log(sampling.min_p) if sampling.min_p else -math.inf
        packed += _INTS.unpack(_PACK.pack(temperature, sampling.top_p, log_min_p, sampling.top_k, low, high))
    return packed


def draw(logits_SV: torch.Tensor, rows_S6: torch.Tensor) -> torch.Tensor:
    """The token ids [S] that rows of float32 logits draw; `rows_S6` is what `pack` made, in int32."""
    S, V = logits_SV.shape
    ids_S = torch.empty(S, dtype=torch.int64, device=logits_SV.device)
    tile = min(MOST_TILE, triton.next_power_of_2(V))
    warps = max(4, tile // TILE_OF_WARP)
    _draw[(S,)](logits_SV, rows_S6, ids_S, V, logits_SV.stride(0), ROW=ROW, TILE=tile, num_warps=warps)
    return ids_S


@triton.jit
def _order(x):
    """Integers that stand to each other as float32 numbers do."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


@triton.jit
def _mix(x):
    """MurmurHash3's finaliser, as in `engine.kernels.draw`."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _largest(row, V, TILE: tl.constexpr):
    """The largest logit and the first token that has it."""
    best, token = float("-inf"), tl.full((), 0, tl.int32)
    for start in range(0, V, TILE):
        ids = start + tl.arange(0, TILE)
        x = tl.load(row + ids, mask=ids < V, other=float("-inf"))
        most = tl.max(x)
        if most > best:
            best, token = most, tl.min(tl.where(x == most, ids, V))
    return best, token


@triton.jit
def _above(row, V, temperature, floor, base, order, TILE: tl.constexpr):
    """Of scaled logits of at least `floor` that come at `order` or later: how many, and their powers' sum."""
    counts, totals = tl.zeros([TILE], tl.int32), tl.zeros([TILE], tl.float32)
    for start in range(0, V, TILE):
        ids = start + tl.arange(0, TILE)
        x = tl.load(row + ids, mask=ids < V, other=float("-inf")) / temperature
        seen = (ids < V) & (x >= floor) & (_order(x) >= order)
        counts += seen.to(tl.int32)
        totals += tl.where(seen, tl.exp(x - base), 0.0)
    return tl.sum(counts), tl.sum(totals)


@triton.jit
def _draw(logits, rows, out, V, stride, ROW: tl.constexpr, TILE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row, how = logits + index * stride, rows + index * ROW
    temperature = tl.load(how).to(tl.float32, bitcast=True)
    largest, token = _largest(row, V, TILE)
    if temperature == 0:
        tl.store(out + index, token.to(tl.int64))
        return
    top_p = tl.load(how + 1).to(tl.float32, bitcast=True)
    log_min_p = tl.load(how + 2).to(tl.float32, bitcast=True)
    top_k = tl.load(how + 3)
    low = tl.load(how + 4).to(tl.uint32, bitcast=True)
    high = tl.load(how + 5).to(tl.uint32, bitcast=True)
    base = largest / temperature
    floor = base + log_min_p

    # All after `last` are in, and of those at it as many as `ties`.
    last, ties = tl.full((), _BELOW_ALL, tl.int32), V
    if (top_k > 0) & (top_k < V):
        lowest, beyond = last.to(tl.int64), _order(base).to(tl.int64) + 1
        for _ in range(33):
            middle = (lowest + beyond) // 2
            count, _total = _above(row, V, temperature, float("-inf"), base, middle, TILE)
            if count >= top_k:
                lowest = middle
            else:
                beyond = middle
        last = lowest.to(tl.int32)
        count, _total = _above(row, V, temperature, float("-inf"), base, lowest + 1, TILE)
        ties = top_k - count
    if top_p < 1:
        more, after = _above(row, V, temperature, floor, base, last.to(tl.int64) + 1, TILE)
        count, whole = _above(row, V, temperature, floor, base, last.to(tl.int64), TILE)
        equal = tl.maximum(count - more, 1)
        whole = after + (whole - after) * tl.minimum(ties, equal) / equal
        wanted = whole * top_p
        lowest, beyond = last.to(tl.int64), _order(base).to(tl.int64) + 1
        for _ in range(33):
            middle = (lowest + beyond) // 2
            _count, total = _above(row, V, temperature, floor, base, middle, TILE)
            if (total >= wanted) & (middle > lowest):
                lowest = middle
            elif middle > lowest:
                beyond = middle
        more, after = _above(row, V, temperature, floor, base, lowest + 1, TILE)
        count, total = _above(row, V, temperature, floor, base, lowest, TILE)
        each = (total - after) / tl.maximum(count - more, 1)
        needed = tl.maximum(1, tl.ceil((wanted - after) / tl.maximum(each, 1e-37)).to(tl.int32))
        ties = tl.where(lowest > last, needed, tl.minimum(ties, needed))
        last = lowest.to(tl.int32)

    best, token = tl.full((), float("-inf"), tl.float64), tl.full((), 0, tl.int32)
    tied = 0
    for start in range(0, V, TILE):
        ids = start + tl.arange(0, TILE)
        x = tl.load(row + ids, mask=ids < V, other=float("-inf")) / temperature
        at = (_order(x) == last) & (ids < V)
        rank = tied + tl.cumsum(at.to(tl.int32)) - 1
        tied += tl.sum(at.to(tl.int32))
        seen = (ids < V) & (x >= floor) & ((_order(x) > last) | (at & (rank < ties)))
        bits = _mix(_mix(ids.to(tl.uint32) + low) ^ high)
        noise = -tl.log(-tl.log((bits.to(tl.float64) + 0.5) / 4294967296.0))
        score = tl.where(seen, x.to(tl.float64) + noise, float("-inf"))
        most = tl.max(score)
        if most > best:
            best, token = most, tl.min(tl.where(score == most, ids, V))
    tl.store(out + index, token.to(tl.int64))
