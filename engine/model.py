"""The Llama decoder, one rank's part of it.

Shapes: T tokens of a step, D hidden, H query heads, K KV heads, E head size, F MLP, V vocabulary,
S sampled rows, P positions. H, K, F and V are this rank's share.

Parallelism is in the lines that name `parallel`: the embedding, attention and MLP end in one sum over
the tensor parallel ranks each; stages pass `x_TD` on. Norms and rotary embedding are in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from engine.attention import KVCache, attend
from engine.batch import Batch
from engine.config import ModelConfig, RopeConfig
from engine.parallel import Parallel
from engine.weights import LayerWeights, Linear, StageWeights


class Llama:
    """One rank's layers. Owns: the rotary tables. Does not own: weights, cache, groups."""

    def __init__(
        self,
        config: ModelConfig,
        weights: StageWeights,
        parallel: Parallel,
        cache: KVCache,
        max_positions: int,
    ) -> None:
        self._config = config
        self._weights = weights
        self._parallel = parallel
        self._cache = cache
        device = cache.keys_NKPE.device
        self._cos_PE, self._sin_PE = (
            x.to(device) for x in rope_tables(config.rope, config.head_dim, max_positions)
        )

    def forward(self, batch: Batch, x_TD: torch.Tensor | None = None) -> torch.Tensor:
        """A stage: [T, D] of the stage before (None on the first) to [T, D] for the next."""
        if x_TD is None:
            x_TD = self._embed(batch.token_ids_T)
        cos_T1E, sin_T1E = self._cos_PE[batch.positions_T, None], self._sin_PE[batch.positions_T, None]
        for index, layer in enumerate(self._weights.layers):
            x_TD = x_TD + self._attention(index, layer, x_TD, batch, cos_T1E, sin_T1E)
            x_TD = x_TD + self._mlp(layer, x_TD)
        return x_TD

    def logits(self, batch: Batch, x_TD: torch.Tensor) -> torch.Tensor:
        """The last stage's float32 logits [S, V of the model] of the rows that sample, S padded."""
        assert self._weights.final_norm is not None
        assert self._weights.head is not None
        x_SD = rms_norm(x_TD[batch.sample_rows_S], self._weights.final_norm, self._config.rms_eps)
        logits_SV = F.linear(x_SD, self._weights.head)
        return self._parallel.gather_vocab(logits_SV)[:, : self._config.vocab_size].float()

    def _embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        table_VD = self._weights.embedding
        assert table_VD is not None
        if self._parallel.grid.tp == 1:
            return F.embedding(token_ids_T, table_VD)
        rows = table_VD.shape[0]
        local_T = token_ids_T - self._parallel.grid.tp_rank * rows
        mine_T = (local_T >= 0) & (local_T < rows)
        x_TD = F.embedding(local_T.clamp(0, rows - 1), table_VD) * mine_T[:, None]
        return self._parallel.all_reduce(x_TD)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x_TD: torch.Tensor,
        batch: Batch,
        cos_T1E: torch.Tensor,
        sin_T1E: torch.Tensor,
    ) -> torch.Tensor:
        E = self._config.head_dim
        x_TD = rms_norm(x_TD, layer.attention_norm, self._config.rms_eps)
        qkv_TAE = linear(x_TD, layer.qkv).view(x_TD.shape[0], -1, E)  # A: heads of query, key and value
        K = self._cache.keys_NKPE.shape[1]
        H = qkv_TAE.shape[1] - 2 * K
        rotated_TAE = rotate(qkv_TAE[:, : H + K], cos_T1E, sin_T1E)
        self._cache.write(index, batch.places_T, rotated_TAE[:, H:], qkv_TAE[:, H + K :])
        out_THE = attend(rotated_TAE[:, :H], self._cache, index, batch.groups)
        return self._parallel.all_reduce(linear(out_THE.flatten(1), layer.out))

    def _mlp(self, layer: LayerWeights, x_TD: torch.Tensor) -> torch.Tensor:
        x_TD = rms_norm(x_TD, layer.mlp_norm, self._config.rms_eps)
        gate_TF, up_TF = linear(x_TD, layer.gate_up).chunk(2, dim=-1)
        return self._parallel.all_reduce(linear(silu(gate_TF) * up_TF, layer.down))


def linear(x: torch.Tensor, weights: Linear) -> torch.Tensor:
    """Apply x W^T + b. Rows are padded by the batch, so that a row's bits do not depend on their number."""
    y = F.linear(x, weights.weight)
    return y if weights.bias is None else y + weights.bias


def silu(x: torch.Tensor) -> torch.Tensor:
    """The activation x * sigmoid(x).

    Not `F.silu`: on a CPU its vectors and their remainder round differently, so that an element's bits
    would depend on where it stands. `exp` and the arithmetic around it do not.
    """
    return (x.float() / (1 + torch.exp(-x.float()))).to(x.dtype)


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Zhang & Sennrich 2019, in float32."""
    x = x_TD.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * x.to(x_TD.dtype)


def rotate(x_TAE: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) with the halves of a head as real and imaginary parts."""
    x = x_TAE.float()
    left, right = x.chunk(2, dim=-1)
    return (x * cos_T1E + torch.cat((-right, left), dim=-1) * sin_T1E).to(x_TAE.dtype)


def rope_tables(rope: RopeConfig, head_dim: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position and frequency, each [positions, head_dim] in float32."""
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        inverse = _llama3_frequencies(rope, inverse)
    angles = torch.arange(positions).float()[:, None] * inverse[None, :]
    angles = torch.cat((angles, angles), dim=-1)
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
