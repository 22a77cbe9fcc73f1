"""Kernels that treat every row alone: residual and RMS norm, the MLP's gate, dequantisation of 8-bit weights.

Shapes: T rows, D hidden, F MLP; N rows and K columns of a matrix. Everything is computed in float32, and
rounded where the reference rounds. `_add_rms_norm` is the kernel to read first: one program has a whole
row in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_GATE_TILE, _DEQUANTISE_TILE = 1024, 4096  # columns per program


def add_rms_norm(
    x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """Add `delta` to `x` in place, and return the RMS norm of the sum (Zhang & Sennrich 2019)."""
    T, D = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    block = triton.next_power_of_2(D)
    _add_rms_norm[(T,)](
        x_TD, x_TD if delta_TD is None else delta_TD, weight_D, out_TD, D, eps,
        ADD=delta_TD is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out_TD


@triton.jit
def _add_rms_norm(x, delta, weight, out, D, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * D
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    values = tl.load(x + at + columns, mask=inside, other=0.0)
    if ADD:
        more = tl.load(delta + at + columns, mask=inside, other=0.0)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(values.dtype)
        tl.store(x + at + columns, values, mask=inside)
    wide = values.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide) / D + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at + columns, (wide.to(values.dtype).to(tl.float32) * scale).to(values.dtype), mask=inside)


def silu_mul(gate_up_TF: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [T, 2 F], gate in the first half of the columns (Shazeer 2020)."""
    T, F = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out_TF = torch.empty(T, F, dtype=gate_up_TF.dtype, device=gate_up_TF.device)
    _silu_mul[(T, triton.cdiv(F, _GATE_TILE))](gate_up_TF, out_TF, F, TILE=_GATE_TILE)
    return out_TF


@triton.jit
def _silu_mul(gate_up, out, F, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < F
    gate = tl.load(gate_up + row * 2 * F + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * F + F + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    # Round here too: the reference computes silu as an operation of its own.
    gated = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out + row * F + columns, (gated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside)


def dequantise(weight_NK: torch.Tensor, scale_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """8-bit rows times their scales, in `dtype`: for products that arithmetic bounds, not memory."""
    (N, K), out_NK = weight_NK.shape, torch.empty_like(weight_NK, dtype=dtype)
    _dequantise[(N, triton.cdiv(K, _DEQUANTISE_TILE))](weight_NK, scale_N, out_NK, K, TILE=_DEQUANTISE_TILE)
    return out_NK


@triton.jit
def _dequantise(weight, scale, out, K, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    values = tl.load(weight + row * K + k, mask=k < K, other=0.0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * K + k, values.to(out.dtype.element_ty), mask=k < K)
