"""Paged attention: write a step's keys and values into the cache, then attend to the blocks of each sequence.

Shapes: T tokens of a step, B sequences, H query heads, K KV heads, G = H / K, E head size, P = 16 places
of a block. A layer's cache is [blocks, K, P, E]: the keys of one head in a block are contiguous, so a
program reads 4 KB at a time (E = 128, 16-bit numbers).

Both attention kernels use the online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): they keep a
running maximum and sum, and never write scores to memory. `decode` does not need lengths on the host, so one
captured CUDA graph of a decode step serves sequences of any length.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from engine.config import BLOCK_SIZE
from engine.kernels.interface import AttentionInput, HeadNorms, Rope

_WRITE_ROWS = 8  # (token, head) pairs per program
_DECODE_TILE = 64  # keys per iteration
_PREFILL_QUERIES, _PREFILL_KEYS = 64, 64
_MAX_SPLITS = 32
_LOG2_E = math.log2(math.e)
# These arguments change with every step: Triton must not compile special kernels for their values.
_ANY_SIZE = ["T", "B"]
_ANY_ALIGNMENT = ["positions", "slots", "sequences"]  # consecutive slices of one tensor


def write_cache(
    qkv_TA: torch.Tensor,
    keys_BKPE: torch.Tensor,
    values_BKPE: torch.Tensor,
    inputs: AttentionInput,
    rope: Rope,
    norms: HeadNorms | None,
) -> None:
    """Norm and rotate queries in place. Norm and rotate keys, and write keys and values into the cache.

    Does nothing for tokens with slot -1, which are padding of a captured graph.
    """
    K, E = keys_BKPE.shape[1], keys_BKPE.shape[3]
    T, A = qkv_TA.shape
    heads = A // E
    _write_cache[(triton.cdiv(T * heads, _WRITE_ROWS),)](
        qkv_TA, keys_BKPE, values_BKPE, rope.cos, rope.sin,
        qkv_TA if norms is None else norms.query, qkv_TA if norms is None else norms.key,
        inputs.positions_T, inputs.slots_T, inputs.tables, inputs.tables.shape[1],
        0.0 if norms is None else norms.eps, T,
        H=heads - 2 * K, K=K, E=E, P=BLOCK_SIZE, HALF=triton.next_power_of_2(E // 2), NORM=norms is not None,
        ROWS=_WRITE_ROWS, num_warps=2,
    )  # fmt: skip


@triton.jit(do_not_specialize=_ANY_SIZE, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _write_cache(
    qkv, keys, values, cos, sin, q_norm, k_norm, positions, slots, tables, table_width, eps, T,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    token, heads = row // (H + 2 * K), row % (H + 2 * K)
    slot = tl.load(slots + token, mask=token < T, other=-1).to(tl.int64)
    position = tl.load(positions + token, mask=token < T, other=0)
    pairs = tl.arange(0, HALF)[None, :]
    there = (slot >= 0) & (pairs < E // 2)
    own = qkv + row * E + pairs
    left = tl.load(own, mask=there, other=0.0)
    right = tl.load(own + E // 2, mask=there, other=0.0)
    dtype: tl.constexpr = left.dtype
    a, b = left.to(tl.float32), right.to(tl.float32)
    if NORM:
        factor = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / E + eps)[:, None]
        a = (a * factor).to(dtype).to(tl.float32) * _head_norm(q_norm, k_norm, heads, pairs, H, E)
        b = (b * factor).to(dtype).to(tl.float32) * _head_norm(q_norm, k_norm, heads, pairs + E // 2, H, E)
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    c = tl.load(cos + position * (E // 2) + pairs, mask=there, other=0.0)
    s = tl.load(sin + position * (E // 2) + pairs, mask=there, other=0.0)
    is_value = heads >= H + K
    left = tl.where(is_value, left, (a * c - b * s).to(dtype))
    right = tl.where(is_value, right, (b * c + a * s).to(dtype))
    queries = there & (heads < H)
    tl.store(own, left, mask=queries)
    tl.store(own + E // 2, right, mask=queries)
    block = tl.load(tables + slot * table_width + position // P, mask=slot >= 0, other=0).to(tl.int64)
    place = ((block * K + (heads + K - H % K) % K) * P + position % P) * E + pairs
    tl.store(keys + place, left, mask=there & (heads >= H) & (heads < H + K))
    tl.store(keys + place + E // 2, right, mask=there & (heads >= H) & (heads < H + K))
    tl.store(values + place, left, mask=there & is_value)
    tl.store(values + place + E // 2, right, mask=there & is_value)


@triton.jit
def _head_norm(q_norm, k_norm, heads, at, H: tl.constexpr, E: tl.constexpr):
    """The weights of each row's head norm, [ROWS, HALF]: those of query or of key heads."""
    q = tl.load(q_norm + at, mask=at < E, other=0.0).to(tl.float32)
    k = tl.load(k_norm + at, mask=at < E, other=0.0).to(tl.float32)
    return tl.where(heads < H, q, k)


def splits_for(sequences: int, kv_heads: int, processors: int) -> int:
    """How many parts to split each sequence's keys into, so that every multiprocessor has two programs.

    A power of two. Depends on the batch size only, not on lengths, which the host does not know.
    """
    wanted = max(1, 2 * processors // (sequences * kv_heads))
    return min(_MAX_SPLITS, 1 << (wanted.bit_length() - 1))


def decode(
    qkv_TA: torch.Tensor,
    keys_BKPE: torch.Tensor,
    values_BKPE: torch.Tensor,
    inputs: AttentionInput,
    out_TA: torch.Tensor,
    *,
    window: int | None,
    splits: int,
) -> None:
    """Attention of the sequences with one query in this step. Leaves the rows of other sequences alone.

    One program has all query heads of a KV head, so keys are read once. A long sequence is split into
    parts for several programs, and a second kernel combines their results (flash-decoding, Dao et al.
    2023).
    """
    K, E = keys_BKPE.shape[1], keys_BKPE.shape[3]
    B, H = inputs.sequences_B4.shape[0], out_TA.shape[1] // E
    device = out_TA.device
    parts = torch.empty(B, H, splits, E, dtype=torch.float32, device=device)
    sums = torch.empty(2, B, H, splits, dtype=torch.float32, device=device)
    shape = {"H": H, "K": K, "E": E, "SPLITS": splits, "E_PAD": max(16, triton.next_power_of_2(E))}
    _decode[(B, K, splits)](
        qkv_TA, keys_BKPE, values_BKPE, parts, sums, inputs.sequences_B4, inputs.tables,
        inputs.tables.shape[1], _LOG2_E * E**-0.5, B, WINDOW=window or 0, P=BLOCK_SIZE, TILE=_DECODE_TILE,
        G_PAD=max(16, triton.next_power_of_2(H // K)), **shape,
    )  # fmt: skip
    _combine_splits[(B, H)](parts, sums, out_TA, inputs.sequences_B4, B, **shape)


@triton.jit
def _read(
    keys, values, table, kv_head, places, seen, size, K: tl.constexpr, E: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Keys and values of a KV head at some positions of a sequence, [TILE, E_PAD]; zero where not `seen`."""
    block = tl.load(table + places // P, mask=seen, other=0).to(tl.int64)
    offset = ((block * K + kv_head) * P + places % P) * E
    there = seen[:, None] & (size < E)[None, :]
    k = tl.load(keys + offset[:, None] + size[None, :], mask=there, other=0.0)
    v = tl.load(values + offset[:, None] + size[None, :], mask=there, other=0.0)
    return k, v


@triton.jit(do_not_specialize=_ANY_SIZE, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _decode(
    qkv, keys, values, parts, sums, sequences, tables, table_width, scale, B,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, E_PAD: tl.constexpr,
    WINDOW: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, G_PAD: tl.constexpr,
):  # fmt: skip
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tl.load(sequences + 4 * sequence + 2) != 1:
        return
    slot = tl.load(sequences + 4 * sequence).to(tl.int64)
    row = tl.load(sequences + 4 * sequence + 1).to(tl.int64)
    length = tl.load(sequences + 4 * sequence + 3) + 1
    first = 0
    if WINDOW:
        first = tl.maximum(0, length - WINDOW)
    part = tl.cdiv(tl.cdiv(length - first, SPLITS), TILE) * TILE
    begin = first + split * part
    end = tl.minimum(begin + part, length)

    G: tl.constexpr = H // K
    group = tl.arange(0, G_PAD)
    size = tl.arange(0, E_PAD)
    heads = kv_head * G + group
    mine = (group < G)[:, None] & (size < E)[None, :]
    q = tl.load(qkv + (row * (H + 2 * K) + heads[:, None]) * E + size[None, :], mask=mine, other=0.0)
    maximum = tl.full([G_PAD], float("-inf"), tl.float32)
    total = tl.zeros([G_PAD], tl.float32)
    out = tl.zeros([G_PAD, E_PAD], tl.float32)
    for at in range(begin, end, TILE):
        places = at + tl.arange(0, TILE)
        seen = places < end
        k, v = _read(keys, values, tables + slot * table_width, kv_head, places, seen, size, K, E, P)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        rescale = tl.exp2(maximum - new_maximum)
        total = total * rescale + tl.sum(weights, 1)
        out = out * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum
    at = (sequence.to(tl.int64) * H + heads) * SPLITS + split
    tl.store(parts + at[:, None] * E + size[None, :], out, mask=mine)
    tl.store(sums + at, maximum, mask=group < G)
    tl.store(sums + B.to(tl.int64) * H * SPLITS + at, total, mask=group < G)


@triton.jit(do_not_specialize=_ANY_SIZE, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _combine_splits(
    parts, sums, out, sequences, B,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    if tl.load(sequences + 4 * sequence + 2) != 1:
        return
    row = tl.load(sequences + 4 * sequence + 1).to(tl.int64)
    split, size = tl.arange(0, SPLITS), tl.arange(0, E_PAD)
    at = (sequence.to(tl.int64) * H + head) * SPLITS + split
    maximum = tl.load(sums + at)
    weight = tl.exp2(maximum - tl.max(maximum))  # 0 for a part without keys
    total = tl.sum(tl.load(sums + B.to(tl.int64) * H * SPLITS + at) * weight)
    inside = (size < E)[None, :]
    values = tl.load(parts + at[:, None] * E + size[None, :], mask=inside, other=0.0)
    result = tl.sum(values * weight[:, None], 0) / total
    tl.store(out + (row * H + head) * E + size, result.to(out.dtype.element_ty), mask=size < E)


def prefill(
    qkv_TA: torch.Tensor,
    keys_BKPE: torch.Tensor,
    values_BKPE: torch.Tensor,
    inputs: AttentionInput,
    out_TA: torch.Tensor,
    *,
    window: int | None,
) -> None:
    """Attention of the sequences with several queries in this step, over all their keys in the cache."""
    K, E = keys_BKPE.shape[1], keys_BKPE.shape[3]
    B, H = inputs.sequences_B4.shape[0], out_TA.shape[1] // E
    _prefill[(triton.cdiv(inputs.max_queries, _PREFILL_QUERIES), H, B)](
        qkv_TA, keys_BKPE, values_BKPE, out_TA, inputs.sequences_B4, inputs.tables, inputs.tables.shape[1],
        _LOG2_E * E**-0.5, H=H, K=K, E=E, E_PAD=max(16, triton.next_power_of_2(E)), WINDOW=window or 0,
        P=BLOCK_SIZE, QUERIES=_PREFILL_QUERIES, TILE=_PREFILL_KEYS,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _prefill(
    qkv, keys, values, out, sequences, tables, table_width, scale,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, WINDOW: tl.constexpr,
    P: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(sequences + 4 * sequence + 2)
    if (count < 2) | (tile * QUERIES >= count):
        return
    slot = tl.load(sequences + 4 * sequence).to(tl.int64)
    start = tl.load(sequences + 4 * sequence + 3)
    queries = tile * QUERIES + tl.arange(0, QUERIES)
    rows = tl.load(sequences + 4 * sequence + 1).to(tl.int64) + queries
    positions = start + queries
    size = tl.arange(0, E_PAD)
    mine = (queries < count)[:, None] & (size < E)[None, :]
    q = tl.load(qkv + (rows[:, None] * (H + 2 * K) + head) * E + size[None, :], mask=mine, other=0.0)
    kv_head = head // (H // K)

    end = tl.minimum(start + count, start + (tile + 1) * QUERIES)
    begin = 0
    if WINDOW:
        begin = tl.maximum(0, start + tile * QUERIES - WINDOW + 1) // TILE * TILE
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, E_PAD], tl.float32)
    for at in range(begin, end, TILE):
        places = at + tl.arange(0, TILE)
        seen = places < end
        k, v = _read(keys, values, tables + slot * table_width, kv_head, places, seen, size, K, E, P)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = seen[None, :] & (places[None, :] <= positions[:, None])
        if WINDOW:
            visible = visible & (places[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A query may see no key of a tile that other queries of the program see: avoid -inf - -inf = NaN.
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(maximum - base)
        total = total * rescale + tl.sum(weights, 1)
        result = result * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum
    result = result / tl.where(total == 0, 1.0, total)[:, None]  # total is 0 in rows that pad the last tile
    tl.store(out + (rows[:, None] * H + head) * E + size[None, :], result.to(out.dtype.element_ty), mask=mine)
