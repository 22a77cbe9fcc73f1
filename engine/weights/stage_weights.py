"""The weights that one rank holds, in the matrices of its kernels. `loader.py` makes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.interface import HeadNorms, Matrix
from engine.weights.architectures import MoeConfig


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
    """A router [experts, D] and the experts, each of them cut over the tensor parallel ranks."""

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
        """Every matrix, each of them once."""
        mlps = self.mlp.experts if isinstance(self.mlp, Moe) else (self.mlp,)
        router = (self.mlp.router,) if isinstance(self.mlp, Moe) else ()
        inner = (matrix for mlp in mlps for matrix in (mlp.gate_up.weight, mlp.down.weight))
        return (self.qkv.weight, self.out.weight, *router, *inner)


@dataclass(frozen=True, slots=True)
class StageWeights:
    """All weights of one rank. The first stage embeds; the last has the final norm and the LM head.

    Embedding and LM head have ceil(V / tp) rows on every rank. Rows beyond V are zero. With tied
    embeddings, the LM head of a rank that has both is the same matrix.
    """

    layers: tuple[LayerWeights, ...]
    embedding: Matrix | None
    final_norm: torch.Tensor | None
    head: Matrix | None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix, each of them once."""
        ends = {id(matrix): matrix for matrix in (self.embedding, self.head) if matrix is not None}
        return (*(matrix for layer in self.layers for matrix in layer.matrices), *ends.values())
