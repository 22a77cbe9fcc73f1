"""The interface of the kernels, and the values that pass through it.

Shapes: T tokens of a step, D hidden, F MLP, H query heads, K KV heads, E head size, B sequences of a step,
S sampled rows, V vocabulary, P positions. H, K and F are this rank's share.

With the native kernels, the bits of a row's result depend on that row alone, not on the batch, on how its
prompt is cut into chunks, or on the number of threads. With other kernels, results may differ by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.kernels.sample import SampleSpec


class Matrix(Protocol):
    """A weight matrix [rows, columns], stored as its kernels need it."""

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        ...

    def write(self, row: int, values_RC: torch.Tensor) -> None:
        """Store consecutive rows from `row` on, with all their columns. Rows never written are zero."""
        ...


class KVCache(Protocol):
    """Keys and values of this rank's layers, in blocks."""

    dtype: torch.dtype

    def copy_blocks(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy (source, destination) blocks, pair after pair, in every layer."""
        ...


@dataclass(frozen=True, slots=True)
class Rope:
    """Cosine and sine of every position and frequency, each [P, E / 2] in float32.

    The first half of a head holds the real parts, the second half the imaginary parts (Su et al. 2021).
    """

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """Which queries of a step attend to which keys. All tensors are int32, on the device.

    Attributes:
        positions_T: the position of each token in its sequence.
        slots_T: the slot of each token's sequence, which is the sequence's row of `tables`; -1 for padding.
        sequences_B4: for each sequence its slot, the first of its rows in the step, how many rows it has, and
            the position of the first.
        tables: the block table of each slot, [slots, blocks].
        max_queries: maximum number of rows of a sequence.
        num_single_queries: how many sequences have one row.
    """

    positions_T: torch.Tensor
    slots_T: torch.Tensor
    sequences_B4: torch.Tensor
    tables: torch.Tensor
    max_queries: int
    num_single_queries: int


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights [E] of the RMS norms of each query and key head, applied before rotation (Qwen3)."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


class Kernels(Protocol):
    """What one device computes. Activations, biases and norm weights have `activation_dtype`."""

    name: str  # for logs
    device: torch.device
    activation_dtype: torch.dtype
    torch_threads: int  # how many threads torch should use beside these kernels
    capturable: bool  # whether a CUDA graph can capture a decode step: no kernel waits for the host

    def matrix(self, rows: int, columns: int, *, gated: bool = False, quantise: bool = True) -> Matrix:
        """An empty matrix.

        Args:
            rows: its number of rows.
            columns: its number of columns.
            gated: the first half of the rows is a gate, the second half is up: for `swiglu`.
            quantise: use the quantised format, if these kernels have one.
        """
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
        """Add `delta` to `x` in place, and return the RMS norm of the sum (Zhang & Sennrich 2019)."""
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
        """Causal attention, [T, H E], of a step's merged queries, keys and values [T, (H + 2 K) E].

        Queries and keys are normed (with `norms`) and rotated. Keys and values are written into the cache.
        Each query attends to its own sequence's keys up to its own position; with `window`, to the last
        `window` of them. May overwrite `qkv_TA`.
        """
        ...

    def warm(self) -> None:
        """Measure and compile what would delay the first request. Called once all matrices are made."""
        ...

    def sample(self, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        """Sample a token id [S] from each row of float32 logits, as `sample.sample_tokens` defines it."""
        ...
