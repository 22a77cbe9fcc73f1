"""Loads what a rank holds into the matrices of its kernels.

Query, key and value become one matrix, and so do gate and up, of an MLP and of each expert. Rows pass
through a buffer of bounded size: kernels pack and quantise them on the way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from engine.grid import Grid
from engine.kernels.interface import HeadNorms, Kernels, Matrix
from engine.weights.locate import Found, find_tensors
from engine.weights.model_config import ModelConfig, MoeConfig
from engine.weights.source import DummySource, FileSource, Source, check_finite, pieces
from engine.weights.stages import stage_layers
from engine.weights.tensors import EMBEDDING, FINAL_NORM, HEAD, Slice, rank_slices, vocab_rows

_log = logging.getLogger(__name__)

_PROGRESS_STEP = 0.01


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix [out, in] and an optional bias [out]."""

    weight: Matrix
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated MLP, or one expert."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Moe:
    """A router [experts, D] and its experts, each of them cut over the tensor parallel ranks."""

    config: MoeConfig
    router: Matrix
    experts: tuple[Mlp, ...]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer on one rank."""

    window: int | None
    attention_norm: torch.Tensor
    qkv: Linear
    head_norms: HeadNorms | None
    out: Linear
    mlp_norm: torch.Tensor
    mlp: Mlp | Moe

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix once."""
        mlps = self.mlp.experts if isinstance(self.mlp, Moe) else (self.mlp,)
        router = (self.mlp.router,) if isinstance(self.mlp, Moe) else ()
        inner = (matrix for mlp in mlps for matrix in (mlp.gate_up.weight, mlp.down.weight))
        return (self.qkv.weight, self.out.weight, *router, *inner)


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
        ends = {id(matrix): matrix for matrix in (self.embedding, self.head) if matrix is not None}
        return (*(matrix for layer in self.layers for matrix in layer.matrices), *ends.values())


@dataclass(frozen=True, slots=True)
class _Read:
    """Write a slice to row `at` and those after it."""

    part: Slice
    into: Matrix | torch.Tensor
    at: int


def load_weights(
    model_dir: str,
    config: ModelConfig,
    grid: Grid,
    kernels: Kernels,
    progress: Callable[[float], None] = lambda fraction: None,
    *,
    load_format: str = "auto",
    check: bool = False,
) -> StageWeights:
    """Load what `grid.rank` needs.

    Args:
        model_dir: an ordinary model directory, or one that was sharded for this layout.
        config: the model.
        grid: the layout and this rank's place in it.
        kernels: whose matrices are filled.
        progress: told the fraction done, 0 to 1.
        load_format: "auto" reads files, "dummy" draws random weights and needs none.
        check: refuse weights that are NaN or infinite.

    Raises:
        ModelError: INVALID_MODEL, naming the tensor and the file; INVALID_LAYOUT.
    """
    with ExitStack() as undo:
        source: Source
        if load_format == "dummy":
            source = DummySource()
        else:
            found = find_tensors(model_dir, config, grid)
            _warn(model_dir, found)
            source = undo.enter_context(FileSource(found.tensors))
        builder = _Builder(config, grid, kernels)
        stage = builder.stage()
        reads = sorted(builder.reads, key=lambda read: source.place(read.part.name))
        total, done, told = sum(_cost(read.part) for read in reads), 0, 0.0
        for read in reads:
            for part in pieces(read.part):
                values = source.read(part)
                if check:
                    check_finite(values, part, source)
                at = read.at + part.rows.start - read.part.rows.start
                if isinstance(read.into, torch.Tensor):
                    read.into[at : at + len(part.rows)].copy_(values)
                else:
                    read.into.write(at, values)
                done += _cost(part)
                if done == total or done / total >= told + _PROGRESS_STEP:
                    told = done / total
                    progress(told)
    return stage


def _cost(part: Slice) -> int:
    """Elements that are read: whole rows, even where only some columns are kept."""
    return len(part.rows) * math.prod(part.whole[1:])


def _warn(model_dir: str, found: Found) -> None:
    if found.unknown:
        more = f" and {len(found.unknown) - 5} more" if len(found.unknown) > 5 else ""
        _log.warning(
            "%s: no part of the model and not loaded: %s%s", model_dir, ", ".join(found.unknown[:5]), more
        )


class _Builder:
    """Makes a stage's matrices and notes what is to be read into each."""

    def __init__(self, config: ModelConfig, grid: Grid, kernels: Kernels) -> None:
        self.reads: list[_Read] = []
        self._config, self._grid, self._kernels = config, grid, kernels
        self._slices = rank_slices(config, grid)

    def stage(self) -> StageWeights:
        """Everything this rank holds."""
        embedding = self._vocab_matrix(EMBEDDING)
        return StageWeights(
            tuple(self._layer(layer) for layer in stage_layers(self._config, self._grid)),
            embedding if self._grid.is_first_stage else None,
            self._vector(FINAL_NORM),
            self._head(embedding) if self._grid.is_last_stage else None,
        )

    def _head(self, embedding: Matrix | None) -> Matrix | None:
        return embedding if self._config.tied_embeddings else self._vocab_matrix(HEAD)

    def _layer(self, layer: int) -> LayerWeights:
        prefix, kind = f"model.layers.{layer}.", self._config.layers[layer]
        attention = f"{prefix}self_attn."
        norm, mlp_norm = (
            self._vector(f"{prefix}{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")
        )
        assert norm is not None
        assert mlp_norm is not None
        return LayerWeights(
            kind.window,
            norm,
            self._linear(attention, ("q_proj", "k_proj", "v_proj")),
            self._head_norms(attention),
            self._linear(attention, ("o_proj",)),
            mlp_norm,
            self._mlp(f"{prefix}mlp.", ("gate_proj", "up_proj", "down_proj"))
            if kind.moe is None
            else self._moe(prefix, kind.moe),
        )

    def _head_norms(self, attention: str) -> HeadNorms | None:
        query, key = (self._vector(f"{attention}{name}.weight") for name in ("q_norm", "k_norm"))
        return None if query is None or key is None else HeadNorms(query, key, self._config.rms_eps)

    def _mlp(self, prefix: str, names: tuple[str, str, str]) -> Mlp:
        return Mlp(self._linear(prefix, names[:2], gated=True), self._linear(prefix, names[2:]))

    def _moe(self, prefix: str, moe: MoeConfig) -> Moe:
        prefix = f"{prefix}{moe.block_name}."
        names = (moe.gate_name, moe.up_name, moe.down_name)
        router = self._kernels.matrix(moe.experts, self._config.hidden_size, quantise=False)
        self.reads.append(_Read(self._slices[f"{prefix}gate.weight"], router, 0))
        return Moe(
            moe,
            router,
            tuple(self._mlp(f"{prefix}experts.{expert}.", names) for expert in range(moe.experts)),
        )

    def _linear(self, prefix: str, names: Sequence[str], *, gated: bool = False) -> Linear:
        """Matrices one under another, with their biases where there are any."""
        parts = [self._slices[f"{prefix}{name}.weight"] for name in names]
        rows = sum(part.shape[0] for part in parts)
        weight = self._kernels.matrix(rows, parts[0].shape[1], gated=gated)
        biases = [self._slices.get(f"{prefix}{name}.bias") for name in names]
        bias = None if biases[0] is None else self._empty(rows)
        at = 0
        for part, bias_part in zip(parts, biases, strict=True):
            self.reads.append(_Read(part, weight, at))
            if bias is not None and bias_part is not None:
                self.reads.append(_Read(bias_part, bias, at))
            at += part.shape[0]
        return Linear(weight, bias)

    def _vocab_matrix(self, name: str) -> Matrix | None:
        if name not in self._slices:
            return None
        matrix = self._kernels.matrix(vocab_rows(self._config, self._grid), self._config.hidden_size)
        self.reads.append(_Read(self._slices[name], matrix, 0))
        return matrix

    def _vector(self, name: str) -> torch.Tensor | None:
        if name not in self._slices:
            return None
        vector = self._empty(self._slices[name].shape[0])
        self.reads.append(_Read(self._slices[name], vector, 0))
        return vector

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=self._kernels.activation_dtype, device=self._kernels.device)
