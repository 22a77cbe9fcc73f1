"""Implements `engine.kernels.interface.Kernels` on a GPU. Shapes as there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from engine.config import BLOCK_SIZE
from engine.kernels.gpu import attention, rows
from engine.kernels.gpu.matrices import QuantisedMatrix
from engine.kernels.gpu.products import GpuMatrix, Products
from engine.kernels.gpu.sample import SPEC_INTS, pack, sample
from engine.kernels.interface import AttentionInput, HeadNorms, KVCache, Matrix, Rope
from engine.kernels.reference import ReferenceMatrix
from engine.kernels.sample import SampleSpec
from engine.kernels.transfer import to_device


class GpuCache:
    """Keys and values per layer, [blocks, K, P, E]; see `attention`."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, blocks, kv_heads, BLOCK_SIZE, head_dim)
        self.dtype = dtype
        self.keys_NBKPE = torch.zeros(shape, dtype=dtype, device=device)
        self.values_NBKPE = torch.zeros(shape, dtype=dtype, device=device)

    def copy_blocks(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy blocks, pair after pair, in every layer."""
        for source, destination in pairs:
            for cache in (self.keys_NBKPE, self.values_NBKPE):
                cache[:, destination] = cache[:, source]


class GpuKernels:
    """Implements `interface.Kernels`."""

    capturable = True
    torch_threads = 1

    def __init__(self, device: torch.device, dtype: torch.dtype, quantisation: str = "") -> None:
        self.device, self.activation_dtype, self._quantisation = device, dtype, quantisation
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            gpu, self._processors = properties.name, properties.multi_processor_count
        else:  # Triton's interpreter
            gpu, self._processors = "no GPU", 1
        self._products = Products(device)
        self._matrices: dict[tuple[int, int, bool], GpuMatrix] = {}  # one of each shape, to measure
        self.name = f"Triton on {gpu}, {quantisation or str(dtype).removeprefix('torch.')}"

    def matrix(self, rows: int, columns: int, *, gated: bool = False, quantise: bool = True) -> Matrix:
        """An empty matrix."""
        made: GpuMatrix
        quantise = quantise and bool(self._quantisation)
        if quantise:
            made = QuantisedMatrix(rows, columns, self._quantisation, self.device)
        else:
            made = ReferenceMatrix(rows, columns, self.activation_dtype, self.device)
        self._matrices.setdefault((rows, columns, quantise), made)
        return made

    def linear(self, x_TD: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product x W^T + b."""
        assert isinstance(matrix, ReferenceMatrix | QuantisedMatrix)
        return self._products.multiply(x_TD, matrix, bias)

    def swiglu(self, x_TD: torch.Tensor, gate_up: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """silu(gate(x)) * up(x)."""
        return rows.silu_mul(self.linear(x_TD, gate_up, bias))

    def embed(self, ids_T: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Rows of a matrix."""
        if isinstance(matrix, QuantisedMatrix):
            return matrix.rows(ids_T, self.activation_dtype)
        assert isinstance(matrix, ReferenceMatrix)
        return F.embedding(ids_T, matrix.weight)

    def add_rms_norm(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add in place, then norm."""
        return rows.add_rms_norm(x_TD, delta_TD, weight_D, eps)

    def cache(self, layers: int, kv_heads: int, head_dim: int, blocks: int) -> KVCache:
        """An empty cache."""
        return GpuCache(layers, kv_heads, head_dim, blocks, self.activation_dtype, self.device)

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
        """Causal attention."""
        assert isinstance(cache, GpuCache)
        keys, values = cache.keys_NBKPE[layer], cache.values_NBKPE[layer]
        K, E = keys.shape[1], keys.shape[3]
        out_TA = torch.empty(
            qkv_TA.shape[0], qkv_TA.shape[1] - 2 * K * E, dtype=qkv_TA.dtype, device=qkv_TA.device
        )
        attention.write_cache(qkv_TA, keys, values, inputs, rope, norms)
        if inputs.num_single_queries:
            splits = attention.splits_for(inputs.num_single_queries, K, self._processors)
            attention.decode(qkv_TA, keys, values, inputs, out_TA, window=window, splits=splits)
        if inputs.max_queries > 1:
            attention.prefill(qkv_TA, keys, values, inputs, out_TA, window=window)
        return out_TA

    def sample(self, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        """Sample a token id per row."""
        return sample(logits_SV, to_device(pack(specs), self.device).view(-1, SPEC_INTS))

    def warm(self) -> None:
        """Choose the fastest tiles for the products with few rows."""
        for matrix in self._matrices.values():
            self._products.measure(matrix, self.activation_dtype)
