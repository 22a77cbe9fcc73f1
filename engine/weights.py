"""Reads this rank's slices of a Llama's weights from safetensors into the matrices of its kernels.

Shapes are [out, in]. Tensor parallelism cuts query, key, value, gate, up, the embedding and the LM head
by rows and the output and down projections by columns. Query, key and value become one matrix, and so
do gate and up. KV heads are replicated when there are fewer of them than ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engine.checkpoint import read_header, weight_files
from engine.config import ModelConfig
from engine.kernels import Kernels, Matrix
from engine.parallel import Grid

# Pages of a mapped file count as this process's memory until the file is closed.
_BYTES_PER_OPEN = 32 << 20


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix [out, in] and an optional bias [out]."""

    weight: Matrix
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer on one rank."""

    attention_norm: torch.Tensor
    qkv: Linear
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class StageWeights:
    """What one rank holds. The first stage embeds; the last has the final norm and the LM head.

    Embedding and LM head have ceil(V / tp) rows on every rank; rows beyond V are zero.
    """

    layers: tuple[LayerWeights, ...]
    embedding: Matrix | None
    final_norm: torch.Tensor | None
    head: Matrix | None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix once."""
        layers = [
            m.weight for layer in self.layers for m in (layer.qkv, layer.out, layer.gate_up, layer.down)
        ]
        ends = {id(matrix): matrix for matrix in (self.embedding, self.head) if matrix is not None}
        return (*layers, *ends.values())


@dataclass(frozen=True, slots=True)
class _Read:
    """Write `[rows, columns]` of a tensor of a known shape to `at` and following rows of a destination."""

    name: str
    shape: tuple[int, ...]
    rows: range
    columns: range | None
    into: Matrix | torch.Tensor
    at: int

    @property
    def bytes(self) -> int:
        """About what reading touches of the file: whole rows, even where only some columns are kept."""
        return len(self.rows) * math.prod(self.shape[1:]) * 2


def load_weights(
    model_dir: str,
    config: ModelConfig,
    grid: Grid,
    kernels: Kernels,
    progress: Callable[[float], None] = lambda fraction: None,
) -> StageWeights:
    """Load what `grid.rank` needs of weights that `check_weights` has passed.

    `progress` is told the fraction done, 0 to 1.
    """
    reads: list[_Read] = []
    stage = _Builder(config, grid, kernels, reads).stage()
    paths = {name: path for path in weight_files(model_dir) for name in read_header(path)}
    total = sum(read.bytes for read in reads)
    done = 0
    for path, batch in _by_file(reads, paths):
        with safe_open(path, framework="pt") as file:
            for read in batch:
                _copy(file.get_slice(read.name), read)
                done += read.bytes
        progress(done / total)
    return stage


class _Builder:
    """Allocates a stage's tensors and notes what is to be read into each."""

    def __init__(self, config: ModelConfig, grid: Grid, kernels: Kernels, reads: list[_Read]) -> None:
        self._config, self._grid, self._kernels, self._reads = config, grid, kernels, reads
        c, tp, rank = config, grid.tp, grid.tp_rank
        heads, kv_heads = c.num_heads // tp, max(1, c.num_kv_heads // tp)
        first_kv = rank * c.num_kv_heads // tp
        self._q = range(rank * heads * c.head_dim, (rank + 1) * heads * c.head_dim)
        self._kv = range(first_kv * c.head_dim, (first_kv + kv_heads) * c.head_dim)
        mlp = c.intermediate_size // tp
        self._mlp = range(rank * mlp, (rank + 1) * mlp)
        vocab = -(-c.vocab_size // tp)
        self._vocab = range(min(rank * vocab, c.vocab_size), min((rank + 1) * vocab, c.vocab_size))
        self._vocab_rows = vocab

    def stage(self) -> StageWeights:
        """Everything this rank holds."""
        c, first, last = self._config, self._grid.is_first_stage, self._grid.is_last_stage
        embedding = (
            self._vocab_matrix("model.embed_tokens.weight") if first or (last and c.tied_embeddings) else None
        )
        head = embedding if c.tied_embeddings else self._vocab_matrix("lm_head.weight") if last else None
        return StageWeights(
            tuple(self._layer(f"model.layers.{i}.") for i in self._grid.layers(c.num_layers)),
            embedding if first else None,
            self._vector("model.norm.weight") if last else None,
            head if last else None,
        )

    def _layer(self, prefix: str) -> LayerWeights:
        c = self._config
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        qkv = [("q_proj", q, self._q), ("k_proj", kv, self._kv), ("v_proj", kv, self._kv)]
        gate_up = [(name, c.intermediate_size, self._mlp) for name in ("gate_proj", "up_proj")]
        return LayerWeights(
            self._vector(f"{prefix}input_layernorm.weight"),
            self._by_rows(f"{prefix}self_attn.", qkv, c.attention_bias),
            self._by_columns(f"{prefix}self_attn.o_proj", q, self._q, c.attention_bias),
            self._vector(f"{prefix}post_attention_layernorm.weight"),
            self._by_rows(f"{prefix}mlp.", gate_up, c.mlp_bias, gated=True),
            self._by_columns(f"{prefix}mlp.down_proj", c.intermediate_size, self._mlp, c.mlp_bias),
        )

    def _by_rows(
        self, prefix: str, parts: list[tuple[str, int, range]], bias: bool, *, gated: bool = False
    ) -> Linear:
        hidden = self._config.hidden_size
        rows = sum(len(part) for _, _, part in parts)
        weight = self._kernels.matrix(rows, hidden, gated=gated)
        merged_bias = self._empty(rows) if bias else None
        at = 0
        for name, size, part in parts:
            self._read(f"{prefix}{name}.weight", (size, hidden), part, None, weight, at)
            if merged_bias is not None:
                self._read(f"{prefix}{name}.bias", (size,), part, None, merged_bias, at)
            at += len(part)
        return Linear(weight, merged_bias)

    def _by_columns(self, name: str, size: int, part: range, bias: bool) -> Linear:
        hidden = self._config.hidden_size
        weight = self._kernels.matrix(hidden, len(part))
        self._read(f"{name}.weight", (hidden, size), range(hidden), part, weight)
        if not bias:
            return Linear(weight)
        if self._grid.tp_rank == 0:  # it is added once, before the sum over ranks
            return Linear(weight, self._vector(f"{name}.bias"))
        return Linear(weight)

    def _vocab_matrix(self, name: str) -> Matrix:
        c = self._config
        weight = self._kernels.matrix(self._vocab_rows, c.hidden_size)
        self._read(name, (c.vocab_size, c.hidden_size), self._vocab, None, weight)
        return weight

    def _vector(self, name: str) -> torch.Tensor:
        hidden = self._config.hidden_size
        vector = self._empty(hidden)
        self._read(name, (hidden,), range(hidden), None, vector)
        return vector

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=self._kernels.activation_dtype, device=self._kernels.device)

    def _read(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: range,
        columns: range | None,
        into: Matrix | torch.Tensor,
        at: int = 0,
    ) -> None:
        step = max(1, _BYTES_PER_OPEN // (math.prod(shape[1:]) * 4))
        for start in range(0, max(1, len(rows)), step):
            part = slice(start, start + step)
            self._reads.append(_Read(name, shape, rows[part], columns, into, at + start))


def _by_file(reads: list[_Read], paths: dict[str, Path]) -> Iterator[tuple[Path, list[_Read]]]:
    """Reads of one file in batches of about _BYTES_PER_OPEN."""
    for path in sorted({paths[read.name] for read in reads}):
        batch: list[_Read] = []
        size = 0
        for read in reads:
            if paths[read.name] != path:
                continue
            batch.append(read)
            size += read.bytes
            if size >= _BYTES_PER_OPEN:
                yield path, batch
                batch, size = [], 0
        if batch:
            yield path, batch


def _copy(source: Any, read: _Read) -> None:
    rows = slice(read.rows.start, read.rows.stop)
    if isinstance(read.into, torch.Tensor):
        read.into[read.at : read.at + len(read.rows)].copy_(source[rows])
    elif read.columns is None:
        read.into.write(read.at, source[rows, :])
    else:
        read.into.write(read.at, source[rows, read.columns.start : read.columns.stop])
