"""What the decoder computes, behind one interface with an implementation per kind of device.

Shapes: T tokens of a step, D hidden, F MLP, H query heads, K KV heads, E head size, B sequences of a step.
H, K and F are this rank's share.

`native` runs on CPUs from our own C++, `gpu` on GPUs in Triton; `reference` is plain torch, for every other
device and to check the others against. A native result depends on its own row alone, bit for bit, whatever
the batch, the chunking of prompts and the number of threads; the others promise equality up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch

from engine.kernels.sample import SampleSpec

_log = logging.getLogger(__name__)


class Matrix(Protocol):
    """A weight matrix [rows, columns] in the form its kernels like best."""

    @property
    def nbytes(self) -> int:
        """Memory held."""
        ...

    def write(self, row: int, values_RC: torch.Tensor) -> None:
        """Store rows `row` and following, all columns of each. Rows never written are zero."""
        ...


class KVCache(Protocol):
    """Keys and values of this rank's layers, in blocks."""

    dtype: torch.dtype

    def copy_blocks(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy (source, destination) blocks in order, in every layer."""
        ...


@dataclass(frozen=True, slots=True)
class Rope:
    """Cosine and sine of every position and frequency, each [P, E / 2] in float32.

    Halves of a head are real and imaginary parts (Su et al. 2021).
    """

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """Who looks at what in a step, all int32 on the device.

    positions_T: each token's position. slots_T: the row of its sequence's block table. sequences_B4: that
    row, a sequence's first row of the step, its queries, and the position of the first. tables: block tables,
    [slots, blocks]. most_queries: the most that a sequence has. single_queries: how many have one.
    """

    positions_T: torch.Tensor
    slots_T: torch.Tensor
    sequences_B4: torch.Tensor
    tables: torch.Tensor
    most_queries: int
    single_queries: int


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights [E] of the norms of each query and key head, before rotation (Qwen3)."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


class Kernels(Protocol):
    """One device's compute. Activations, biases and norm weights have `activation_dtype`."""

    name: str  # what was chosen, for people
    device: torch.device
    activation_dtype: torch.dtype
    torch_threads: int  # that torch should use beside these kernels
    capturable: bool  # whether a CUDA graph can capture a decode step: it never waits for the host

    def matrix(self, rows: int, columns: int, *, gated: bool = False, quantise: bool = True) -> Matrix:
        """An empty matrix; `gated` stacks gate over up, for `swiglu`."""
        ...

    def linear(self, x_TD: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product x W^T + b, [T, rows]."""
        ...

    def swiglu(self, x_TD: torch.Tensor, gate_up: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """silu(gate(x)) * up(x), [T, F], of a gated matrix [2 F, D] (Shazeer 2020)."""
        ...

    def embed(self, ids_T: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Rows `ids_T` of a matrix."""
        ...

    def add_rms_norm(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add `delta` to `x` in place, and return the norm of the sum (Zhang & Sennrich 2019)."""
        ...

    def cache(self, layers: int, kv_heads: int, head_dim: int, blocks: int) -> KVCache:
        """An empty cache."""
        ...

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
        """Causal attention [T, H E] of a step's merged queries, keys and values [T, (H + 2 K) E].

        Queries and keys are normed and rotated, keys and values written into the cache, and each query
        looks at its own sequence's keys up to itself, at the last `window` of them where it is given.
        `qkv_TA` may be overwritten.
        """
        ...

    def warm(self) -> None:
        """Do what would keep a first request waiting, once all matrices are there."""
        ...

    def sample(self, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        """Sample a token id [S] from each row of float32 logits, as `sample.sample_tokens` defines it."""
        ...


def choose(device: torch.device, dtype: torch.dtype, quantisation: str = "", *, threads: int = 1) -> Kernels:
    """The fastest kernels that run here, on `threads` threads of a CPU.

    Raises:
        ModelError: INVALID_LAYOUT, quantised weights where only the reference runs.
    """
    from engine.errors import ModelError
    from engine.kernels.native import NativeKernels, library
    from engine.kernels.reference import ReferenceKernels

    on_cpu = device.type == "cpu" and quantisation in ("", "int8", "int4")
    if on_cpu and dtype in (torch.float32, torch.bfloat16) and library() is not None:
        return NativeKernels(dtype, quantisation, threads=threads)
    if device.type == "cuda" and quantisation in ("", "int8", "fp8") and _has_triton():
        from engine.kernels.gpu.kernels import GpuKernels

        return GpuKernels(device, dtype, quantisation)
    if quantisation:
        raise ModelError(
            "INVALID_LAYOUT",
            f"{quantisation} weights are not for device {device.type} with dtype "
            f"{str(dtype).removeprefix('torch.')}: CPUs take int8 and int4 with float32 or bfloat16, "
            "GPUs int8 and fp8",
        )
    return ReferenceKernels(device, dtype, threads=threads)


def _has_triton() -> bool:
    if find_spec("triton") is not None:
        return True
    _log.warning("Triton is not installed: attention and all else run in plain torch, many times slower")
    return False


__all__ = [
    "AttentionInput",
    "HeadNorms",
    "KVCache",
    "Kernels",
    "Matrix",
    "Rope",
    "choose",
]
