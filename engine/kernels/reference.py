"""The kernels in plain torch, for every device and dtype. The other implementations are checked against them.

Shapes as in `interface.py`, and L keys, Q queries of a sequence. Norms, rotation and softmax are in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from engine.config import BLOCK_SIZE
from engine.kernels.interface import AttentionInput, HeadNorms, KVCache, Matrix, Rope
from engine.kernels.sample import SampleSpec, sample_tokens


class ReferenceMatrix:
    """A torch tensor [rows, columns]."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.zeros(rows, columns, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.weight.nbytes

    def write(self, row: int, values_RC: torch.Tensor) -> None:
        """Store rows."""
        self.weight[row : row + values_RC.shape[0]].copy_(values_RC)


class ReferenceCache:
    """Keys and values per layer, [K, places, E]. A block is 16 consecutive places."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, kv_heads, blocks * BLOCK_SIZE, head_dim)
        self.dtype = dtype
        self.keys_NKPE = torch.zeros(shape, dtype=dtype, device=device)
        self.values_NKPE = torch.zeros(shape, dtype=dtype, device=device)

    def copy_blocks(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy blocks, pair after pair, in every layer."""
        for cache in (self.keys_NKPE, self.values_NKPE):
            blocks = cache.view(*cache.shape[:2], -1, BLOCK_SIZE, cache.shape[3])
            for source, destination in pairs:
                blocks[:, :, destination] = blocks[:, :, source]


class ReferenceKernels:
    """Implements `interface.Kernels`."""

    capturable = False

    def __init__(self, device: torch.device, dtype: torch.dtype, *, threads: int = 1) -> None:
        self.name = f"torch on {device}, {str(dtype).removeprefix('torch.')}, {threads} threads"
        self.torch_threads = threads
        self.device = device
        self.activation_dtype = dtype

    def matrix(self, rows: int, columns: int, *, gated: bool = False, quantise: bool = True) -> Matrix:
        """An empty matrix."""
        return ReferenceMatrix(rows, columns, self.activation_dtype, self.device)

    def linear(self, x_TD: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product x W^T + b."""
        return F.linear(x_TD, _weight(matrix), bias)

    def swiglu(self, x_TD: torch.Tensor, gate_up: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """silu(gate(x)) * up(x)."""
        gate_TF, up_TF = self.linear(x_TD, gate_up, bias).chunk(2, dim=-1)
        return F.silu(gate_TF) * up_TF

    def embed(self, ids_T: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Rows of a matrix."""
        return F.embedding(ids_T, _weight(matrix))

    def add_rms_norm(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add in place, then norm."""
        if delta_TD is not None:
            x_TD += delta_TD
        return _rms_norm(x_TD, weight_D, eps)

    def cache(self, layers: int, kv_heads: int, head_dim: int, blocks: int) -> KVCache:
        """An empty cache."""
        return ReferenceCache(layers, kv_heads, head_dim, blocks, self.activation_dtype, self.device)

    def attend(
        self,
        qkv_TA: torch.Tensor,
        cache: KVCache,
        layer: int,
        inputs: AttentionInput,
        rope: Rope,
        *,
        window: int | None = None,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        """Causal attention, one sequence after another."""
        assert isinstance(cache, ReferenceCache)
        keys_KPE, values_KPE = cache.keys_NKPE[layer], cache.values_NKPE[layer]
        K, _, E = keys_KPE.shape
        T = qkv_TA.shape[0]
        qkv_TAE = qkv_TA.view(T, -1, E)
        H = qkv_TAE.shape[1] - 2 * K
        q_THE, k_TKE, v_TKE = qkv_TAE[:, :H], qkv_TAE[:, H : H + K], qkv_TAE[:, H + K :]
        if norms is not None:
            q_THE, k_TKE = _rms_norm(q_THE, norms.query, norms.eps), _rms_norm(k_TKE, norms.key, norms.eps)
        positions_T = inputs.positions_T.long()
        cos_T1E, sin_T1E = rope.cos[positions_T, None], rope.sin[positions_T, None]
        q_THE, k_TKE = _rotate(q_THE, cos_T1E, sin_T1E), _rotate(k_TKE, cos_T1E, sin_T1E)
        out_THE = torch.empty_like(q_THE)
        for slot, first, queries, start in inputs.sequences_B4.tolist():
            rows, length = slice(first, first + queries), start + queries
            blocks = inputs.tables[slot, : -(-length // BLOCK_SIZE)].long()
            places_L = (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=self.device)).flatten()
            keys_KPE[:, places_L[start:length]] = k_TKE[rows].transpose(0, 1)
            values_KPE[:, places_L[start:length]] = v_TKE[rows].transpose(0, 1)
            positions_Q1 = torch.arange(start, length, device=self.device)[:, None]
            first_key = 0 if window is None else max(0, start - window + 1)
            keys_1L = torch.arange(first_key, length, device=self.device)[None]
            visible_QL = keys_1L <= positions_Q1
            if window is not None:
                visible_QL &= keys_1L > positions_Q1 - window
            places_L = places_L[first_key:length]
            out_HQE = F.scaled_dot_product_attention(
                q_THE[rows].transpose(0, 1)[None].float(),
                keys_KPE[:, places_L][None].float(),
                values_KPE[:, places_L][None].float(),
                attn_mask=visible_QL,
                enable_gqa=True,
            )[0]
            out_THE[rows] = out_HQE.transpose(0, 1).to(out_THE.dtype)
        return out_THE.flatten(1)

    def warm(self) -> None:
        """Do nothing."""

    def sample(self, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        """Sample a token id per row."""
        return sample_tokens(logits_SV, specs)


def _weight(matrix: Matrix) -> torch.Tensor:
    assert isinstance(matrix, ReferenceMatrix)
    return matrix.weight


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Zhang & Sennrich 2019, in float32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotate(x_TAE: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
    """Rotary embedding. The halves of a head are the real and the imaginary parts."""
    left, right = x_TAE.float().chunk(2, dim=-1)
    return torch.cat((left * cos_T1E - right * sin_T1E, right * cos_T1E + left * sin_T1E), -1).to(x_TAE.dtype)
