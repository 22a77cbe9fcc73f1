"""Products x W^T of few rows of x: bound by the memory traffic of W, not by arithmetic.

Shapes: M rows of x, N rows and K columns of W. W may be int8 or float8 with a scale per row. It is
dequantised in registers, so only the stored bytes are read.

A program takes some rows of W, and one of `splits` parts of the columns: so narrow matrices, too, give
work to every multiprocessor ("split-K"). A second kernel adds up the parts, always in the same order.
`tuning` measures which tiles are best for a shape, and whether cuBLAS is better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE_ROWS = 16  # rows of x in a tile: the minimum of the tensor cores
MAX_ROWS = 256  # of x; products with more rows are bound by arithmetic
_ADD_TILE = 1024


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows and columns of W in a tile, and the number of parts that the columns are split into."""

    rows: int
    columns: int
    splits: int


CANDIDATES = tuple(
    Tiles(rows, columns, splits)
    for rows, columns in ((4, 1024), (8, 512), (16, 256), (32, 128), (64, 128))
    for splits in (1, 2, 4)
)


def gemv(
    x_MK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    tiles: Tiles,
    scale_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product x W^T + b, [M, N]. With `scale_N`, W is quantised, and row n of W has the scale n."""
    (M, K), N = x_MK.shape, weight_NK.shape[0]
    out_MN = torch.empty(M, N, dtype=x_MK.dtype, device=x_MK.device)
    parts = out_MN
    if tiles.splits > 1:
        parts = torch.empty(tiles.splits, M, N, dtype=torch.float32, device=x_MK.device)
    bias, scale = (x_MK if each is None else each for each in (bias_N, scale_N))
    # A single row is multiplied element by element. More rows use the tensor cores, which need 16 rows of W.
    rows = max(16, tiles.rows) if M > 1 else tiles.rows
    m_pad = 1 if M == 1 else TILE_ROWS if M <= TILE_ROWS else 64
    _gemv[(triton.cdiv(N, rows), tiles.splits, triton.cdiv(M, m_pad))](
        x_MK, weight_NK, bias, scale, parts, M, N, K,
        triton.cdiv(triton.cdiv(K, tiles.splits), tiles.columns),
        BIAS=bias_N is not None and tiles.splits == 1, SCALE=scale_N is not None, ROWS=rows,
        COLUMNS=tiles.columns, M_PAD=m_pad,
    )  # fmt: skip
    if tiles.splits > 1:
        _add_parts[(M, triton.cdiv(N, _ADD_TILE))](
            parts, bias, out_MN, M, N, BIAS=bias_N is not None, SPLITS=tiles.splits, TILE=_ADD_TILE
        )
    return out_MN


@triton.jit(do_not_specialize=["M"])
def _gemv(
    x, weight, bias, scale, out, M, N, K, steps,
    BIAS: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, M_PAD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    m = tl.program_id(2) * M_PAD + tl.arange(0, M_PAD)
    first = split * steps * COLUMNS
    if M_PAD == 1:
        lanes = tl.zeros([ROWS, COLUMNS], tl.float32)
    else:
        total = tl.zeros([M_PAD, ROWS], tl.float32)
    for step in range(steps):
        k = first + step * COLUMNS + tl.arange(0, COLUMNS)
        w_at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
        w = tl.load(w_at, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        if M_PAD == 1:
            values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
            lanes += w.to(tl.float32) * values[None, :]
        else:
            values = tl.load(
                x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0
            )
            total += tl.dot(values, tl.trans(w.to(values.dtype)), input_precision="ieee")
    if M_PAD == 1:
        total = tl.sum(lanes, 1)[None, :]
    if SCALE:
        total *= tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = out + split.to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _add_parts(parts, bias, out, M, N, BIAS: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + (split * M + m) * N + n, mask=n < N, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=n < N)
