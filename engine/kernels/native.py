"""The native kernels: our C++ sources, called through ctypes, for x86-64 CPUs.

Formats of weights: float32, bf16, int8 with a scale per row, int4 with a scale per row and 64 columns.
Weights are packed into panels of 16 rows while they are loaded (`panels.h`). Activations and sums are
float32.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch

from engine.config import BLOCK_SIZE
from engine.kernels.interface import AttentionInput, HeadNorms, KVCache, Matrix, Rope
from engine.kernels.native_library import AttentionCall, LinearCall, NativeLibrary, PackCall
from engine.kernels.sample import GREEDY_BELOW, SampleSpec, noise_key

_PANEL = 16
_FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}  # as FOR_FORMAT in panels.h numbers them


class _Spec(ctypes.Structure):
    _fields_ = (
        ("temperature", ctypes.c_float), ("top_p", ctypes.c_float), ("log_min_p", ctypes.c_float),
        ("top_k", ctypes.c_int32), ("low", ctypes.c_uint32), ("high", ctypes.c_uint32),
    )  # fmt: skip


class NativeMatrix:
    """Panels of 16 rows, an even number of them. A gated matrix alternates panels of gate and up."""

    def __init__(
        self, functions: Any, threads: int, format: int, rows: int, columns: int, gated: bool
    ) -> None:
        if columns % 2:
            raise ValueError(f"{columns} columns: native matrices have an even number")
        self._functions, self._threads = functions, threads
        self.format, self.rows, self.columns, self.gated = format, rows, columns, gated
        panels = 2 * -(-rows // 2 // _PANEL) if gated else 2 * -(-rows // (2 * _PANEL))
        self.nbytes = panels * functions.phalanx_panel_bytes(format, columns)
        # Every step reads the whole matrix. Huge pages save TLB misses.
        self.data = _zeros(self.nbytes, huge_pages=True)

    def write(self, row: int, values_RC: torch.Tensor) -> None:
        """Pack rows into panels, and quantise them if the format is a quantised one."""
        values = values_RC.float().contiguous()
        call = PackCall(
            self.data.data_ptr(), values.data_ptr(), row, values.shape[0], self.columns,
            self.rows // 2 if self.gated else 0,
        )  # fmt: skip
        self._functions.phalanx_pack(self.format, ctypes.byref(call), self._threads)


class NativeCache:
    """For each layer, block and KV head: one panel of keys, and E / 16 panels of values."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, blocks: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kv_heads, self.head_dim = kv_heads, head_dim
        shape = (layers, blocks, kv_heads * -(-head_dim // _PANEL) * _PANEL * BLOCK_SIZE)
        size = layers * blocks * shape[2] * dtype.itemsize
        self.keys, self.values = (_zeros(size).view(dtype).view(shape) for _ in range(2))

    def copy_blocks(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy blocks, pair after pair, in every layer."""
        for source, destination in pairs:
            for blocks in (self.keys, self.values):
                blocks[:, destination] = blocks[:, source]


class NativeKernels:
    """Implements `interface.Kernels`."""

    device = torch.device("cpu")
    activation_dtype = torch.float32
    capturable = False
    torch_threads = 1  # torch's threads spin while they wait, and would take cores from these kernels

    def __init__(
        self, library: NativeLibrary, dtype: torch.dtype, quantisation: str = "", *, threads: int = 1
    ) -> None:
        self._functions, self._dtype, self._threads = library.functions, dtype, threads
        name = str(dtype).removeprefix("torch.")
        self._format = _FORMATS[name]
        self._quantised_format = _FORMATS[quantisation or name]
        self.name = f"native {library.variant}, {quantisation or name}, {threads} threads"

    def matrix(self, rows: int, columns: int, *, gated: bool = False, quantise: bool = True) -> Matrix:
        """An empty matrix."""
        format = self._quantised_format if quantise else self._format
        return NativeMatrix(self._functions, self._threads, format, rows, columns, gated)

    def linear(self, x_TD: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product x W^T + b."""
        return self._product(x_TD, matrix, bias, gated=False)

    def swiglu(self, x_TD: torch.Tensor, gate_up: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """silu(gate(x)) * up(x)."""
        return self._product(x_TD, gate_up, bias, gated=True)

    def embed(self, ids_T: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Rows of a matrix."""
        assert isinstance(matrix, NativeMatrix)
        ids = ids_T.to(torch.int64).contiguous()
        out = torch.empty(ids.shape[0], matrix.columns)
        self._functions.phalanx_unpack(
            matrix.format, matrix.data.data_ptr(), ids.data_ptr(), out.data_ptr(), ids.shape[0],
            matrix.columns, self._threads,
        )  # fmt: skip
        return out

    def add_rms_norm(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add in place, then norm."""
        out_TD = torch.empty_like(x_TD)
        self._functions.phalanx_add_rms_norm(
            x_TD.data_ptr(), None if delta_TD is None else delta_TD.data_ptr(), weight_D.data_ptr(),
            out_TD.data_ptr(), x_TD.shape[0], x_TD.shape[1], eps, self._threads,
        )  # fmt: skip
        return out_TD

    def cache(self, layers: int, kv_heads: int, head_dim: int, blocks: int) -> KVCache:
        """An empty cache."""
        return NativeCache(layers, kv_heads, head_dim, blocks, self._dtype)

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
        assert isinstance(cache, NativeCache)
        K, E, T = cache.kv_heads, cache.head_dim, qkv_TA.shape[0]
        H = qkv_TA.shape[1] // E - 2 * K
        out_TA = torch.empty(T, H * E)
        call = AttentionCall(
            qkv_TA.data_ptr(), out_TA.data_ptr(),
            cache.keys[layer].data_ptr(), cache.values[layer].data_ptr(),
            rope.cos.data_ptr(), rope.sin.data_ptr(),
            None if norms is None else norms.query.data_ptr(),
            None if norms is None else norms.key.data_ptr(),
            inputs.positions_T.data_ptr(), inputs.sequences_B4.data_ptr(), inputs.tables.data_ptr(),
            T, inputs.sequences_B4.shape[0], H, K, E, inputs.tables.shape[1], window or 0,
            0.0 if norms is None else norms.eps, E**-0.5,
        )  # fmt: skip
        self._functions.phalanx_attend(self._format, ctypes.byref(call), self._threads)
        return out_TA

    def warm(self) -> None:
        """Do nothing: these kernels are compiled when the project is installed."""

    def sample(self, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        """Sample a token id per row."""
        logits_SV = logits_SV.contiguous()
        ids_S = torch.empty(len(specs), dtype=torch.int64)
        packed = (_Spec * len(specs))(*map(_pack_spec, specs))
        self._functions.phalanx_sample(
            logits_SV.data_ptr(), packed, ids_S.data_ptr(), len(specs), logits_SV.shape[1], self._threads
        )
        return ids_S

    def _product(
        self, x_TD: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None, gated: bool
    ) -> torch.Tensor:
        assert isinstance(matrix, NativeMatrix)
        assert matrix.gated == gated
        assert x_TD.is_contiguous()
        assert x_TD.shape[1] == matrix.columns
        rows = matrix.rows // 2 if gated else matrix.rows
        out = torch.empty(x_TD.shape[0], rows)
        call = LinearCall(
            x_TD.data_ptr(), matrix.data.data_ptr(), None if bias is None else bias.data_ptr(),
            out.data_ptr(), x_TD.shape[0], rows, matrix.columns, gated,
        )  # fmt: skip
        self._functions.phalanx_linear(matrix.format, ctypes.byref(call), self._threads)
        return out


def _pack_spec(spec: SampleSpec) -> _Spec:
    sampling, (low, high) = spec.sampling, noise_key(spec)
    if sampling.temperature < GREEDY_BELOW:
        return _Spec(0, 1, -math.inf, 0, low, high)
    log_min_p = math.log(sampling.min_p) if sampling.min_p else -math.inf
    return _Spec(sampling.temperature, sampling.top_p, log_min_p, sampling.top_k, low, high)


def _zeros(size: int, *, huge_pages: bool = False) -> torch.Tensor:
    """Zero bytes. A page takes no memory until it is first written."""
    pages = mmap.mmap(-1, max(size, 1))
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=size)
