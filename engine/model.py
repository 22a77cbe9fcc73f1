"""The Llama decoder, one rank's part of it.

Shapes: T tokens of a step, D hidden, H query heads, K KV heads, E head size, A = (H + 2 K) E, V vocabulary,
S sampled rows, P positions. H, K and V are this rank's share.

Parallelism is in the lines that name `parallel`: the embedding, attention and MLP end in one sum over
the tensor parallel ranks each; stages pass `x_TD` on.
"""

from __future__ import annotations

import math

import torch

from engine.batch import Batch
from engine.config import ModelConfig, RopeConfig
from engine.kernels import Kernels, KVCache, Rope
from engine.parallel import Parallel
from engine.weights import StageWeights


class Llama:
    """One rank's layers. Owns: the rotary tables. Does not own: weights, cache, groups."""

    def __init__(
        self,
        config: ModelConfig,
        weights: StageWeights,
        parallel: Parallel,
        kernels: Kernels,
        cache: KVCache,
        max_positions: int,
    ) -> None:
        self._config = config
        self._weights = weights
        self._parallel = parallel
        self._kernels = kernels
        self._cache = cache
        cos_PE, sin_PE = rope_tables(config.rope, config.head_dim, max_positions)
        self._rope = Rope(cos_PE.to(kernels.device), sin_PE.to(kernels.device))

    def forward(self, batch: Batch, x_TD: torch.Tensor | None = None) -> torch.Tensor:
        """A stage: [T, D] of the stage before (None on the first) to [T, D] for the next."""
        ops, eps, reduce = self._kernels, self._config.rms_eps, self._parallel.all_reduce
        if x_TD is None:
            x_TD = self._embed(batch.token_ids_T)
        delta_TD = None
        for index, layer in enumerate(self._weights.layers):
            y_TD = ops.add_rms_norm(x_TD, delta_TD, layer.attention_norm, eps)
            qkv_TA = ops.linear(y_TD, layer.qkv.weight, layer.qkv.bias)
            y_TA = ops.attend(qkv_TA, self._cache, index, batch.attention, self._rope)
            delta_TD = reduce(ops.linear(y_TA, layer.out.weight, layer.out.bias))
            y_TD = ops.add_rms_norm(x_TD, delta_TD, layer.mlp_norm, eps)
            y_TF = ops.swiglu(y_TD, layer.gate_up.weight, layer.gate_up.bias)
            delta_TD = reduce(ops.linear(y_TF, layer.down.weight, layer.down.bias))
        return x_TD if delta_TD is None else x_TD.add_(delta_TD)

    def logits(self, rows_S: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """The last stage's float32 logits [S, V of the model] of some rows."""
        assert self._weights.final_norm is not None
        assert self._weights.head is not None
        x_SD = x_TD[rows_S]
        x_SD = self._kernels.add_rms_norm(x_SD, None, self._weights.final_norm, self._config.rms_eps)
        logits_SV = self._parallel.gather_vocab(self._kernels.linear(x_SD, self._weights.head))
        return logits_SV[:, : self._config.vocab_size].float()

    def _embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        table = self._weights.embedding
        assert table is not None
        if self._parallel.grid.tp == 1:
            return self._kernels.embed(token_ids_T, table)
        rows = -(-self._config.vocab_size // self._parallel.grid.tp)
        local_T = token_ids_T - self._parallel.grid.tp_rank * rows
        mine_T = (local_T >= 0) & (local_T < rows)
        x_TD = self._kernels.embed(local_T.clamp(0, rows - 1), table) * mine_T[:, None]
        return self._parallel.all_reduce(x_TD)


def rope_tables(rope: RopeConfig, head_dim: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position and frequency, each [positions, head_dim / 2] in float32."""
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        inverse = _llama3_frequencies(rope, inverse)
    angles = torch.arange(positions).float()[:, None] * inverse[None, :]
    return angles.cos(), angles.sin()


def _llama3_frequencies(rope: RopeConfig, inverse: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, between them interpolated."""
    wavelength = 2 * math.pi / inverse
    longest = rope.original_max_position / rope.low_freq_factor
    shortest = rope.original_max_position / rope.high_freq_factor
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - blend) * inverse / rope.factor + blend * inverse
    stretched = torch.where(wavelength > longest, inverse / rope.factor, inverse)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, stretched)
