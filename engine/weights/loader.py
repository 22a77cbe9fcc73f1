"""Loads a rank's weights into the matrices of its kernels.

Query, key and value become one matrix. So do gate and up, of an MLP and of each expert. Rows pass through
a buffer of bounded size, and the kernels pack and quantise them there: loading needs little memory beyond
the weights.
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
from engine.weights.architectures import MoeConfig
from engine.weights.dummy_source import DummySource
from engine.weights.file_source import FileSource
from engine.weights.locate import find_tensors
from engine.weights.model_config import ModelConfig
from engine.weights.source import Source, check_finite, chunks
from engine.weights.stage_weights import LayerWeights, Linear, Mlp, Moe, StageWeights
from engine.weights.stages import stage_layers
from engine.weights.tensors import EMBEDDING, FINAL_NORM, HEAD, TensorSlice, rank_slices, vocab_rows

_log = logging.getLogger(__name__)

_PROGRESS_STEP = 0.01


@dataclass(frozen=True, slots=True)
class _Placement:
    """Where a slice goes: into rows of a matrix or elements of a vector, from `start` on."""

    part: TensorSlice
    destination: Matrix | torch.Tensor
    start: int

    def write(self, chunk: TensorSlice, values: torch.Tensor) -> None:
        """Store the values of a chunk of the slice."""
        start = self.start + chunk.rows.start - self.part.rows.start
        if isinstance(self.destination, torch.Tensor):
            self.destination[start : start + len(chunk.rows)].copy_(values)
        else:
            self.destination.write(start, values)


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
    """Load the weights of the rank `grid.rank`.

    Args:
        model_dir: an ordinary model directory, or one that was sharded for this layout.
        config: the model.
        grid: the layout and this rank's place in it.
        kernels: these make the matrices.
        progress: called with the fraction done, 0 to 1.
        load_format: "auto" reads files; "dummy" generates random weights and needs only config.json.
        check: refuse weights that are NaN or infinite.

    Raises:
        ModelError: INVALID_MODEL, naming the tensor and the file; INVALID_LAYOUT.
    """
    with ExitStack() as undo:
        source: Source
        if load_format == "dummy":
            source = DummySource()
        else:
            tensors = find_tensors(model_dir, config, grid)
            _warn_of_unknown(model_dir, tensors.unknown_names)
            source = undo.enter_context(FileSource(tensors.stored))
        builder = _Builder(config, grid, kernels)
        stage = builder.stage()
        placements = sorted(builder.placements, key=lambda placement: source.order(placement.part.name))
        total, done, reported = sum(_elements_read(each.part) for each in placements), 0, 0.0
        for placement in placements:
            for chunk in chunks(placement.part):
                values = source.read(chunk)
                if check:
                    check_finite(values, chunk, source)
                placement.write(chunk, values)
                done += _elements_read(chunk)
                if done == total or done / total >= reported + _PROGRESS_STEP:
                    reported = done / total
                    progress(reported)
    return stage


def _elements_read(part: TensorSlice) -> int:
    """How many elements a source reads for a slice: whole rows, even if only some columns are used."""
    return len(part.rows) * math.prod(part.whole[1:])


def _warn_of_unknown(model_dir: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        _log.warning("%s: no part of the model and not loaded: %s%s", model_dir, ", ".join(names[:5]), more)


class _Builder:
    """Makes a stage's empty matrices, and collects which slices belong into them."""

    def __init__(self, config: ModelConfig, grid: Grid, kernels: Kernels) -> None:
        self.placements: list[_Placement] = []
        self._config, self._grid, self._kernels = config, grid, kernels
        self._slices = rank_slices(config, grid)

    def stage(self) -> StageWeights:
        """All matrices and vectors of this rank, still empty."""
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
        self.placements.append(_Placement(self._slices[f"{prefix}gate.weight"], router, 0))
        return Moe(
            moe,
            router,
            tuple(self._mlp(f"{prefix}experts.{expert}.", names) for expert in range(moe.experts)),
        )

    def _linear(self, prefix: str, names: Sequence[str], *, gated: bool = False) -> Linear:
        """One matrix of several, one under another, with their biases if they have any."""
        parts = [self._slices[f"{prefix}{name}.weight"] for name in names]
        rows = sum(part.shape[0] for part in parts)
        weight = self._kernels.matrix(rows, parts[0].shape[1], gated=gated)
        biases = [self._slices.get(f"{prefix}{name}.bias") for name in names]
        bias = None if biases[0] is None else self._empty(rows)
        start = 0
        for part, bias_part in zip(parts, biases, strict=True):
            self.placements.append(_Placement(part, weight, start))
            if bias is not None and bias_part is not None:
                self.placements.append(_Placement(bias_part, bias, start))
            start += part.shape[0]
        return Linear(weight, bias)

    def _vocab_matrix(self, name: str) -> Matrix | None:
        if name not in self._slices:
            return None
        matrix = self._kernels.matrix(vocab_rows(self._config, self._grid), self._config.hidden_size)
        self.placements.append(_Placement(self._slices[name], matrix, 0))
        return matrix

    def _vector(self, name: str) -> torch.Tensor | None:
        if name not in self._slices:
            return None
        vector = self._empty(self._slices[name].shape[0])
        self.placements.append(_Placement(self._slices[name], vector, 0))
        return vector

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=self._kernels.activation_dtype, device=self._kernels.device)
