"""A model's tensors: their names in the files, their shapes, and which slices of them a rank holds.

Names are those of published checkpoints. Shapes are [out, in]. Imports no torch.

Tensor parallelism cuts query, key, value, gate, up, the embedding and the LM head by rows, and the output
and down projections by columns. KV heads are replicated when there are fewer of them than ranks. Each
expert is cut like an MLP, not given whole to one rank (no expert parallelism): so every rank has the same
work whatever the router chooses, and no token travels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.grid import Grid
from engine.weights.model_config import ModelConfig
from engine.weights.stages import stage_layers

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Rows of a tensor, and columns of these rows (None: all). `whole` is the shape of the tensor."""

    name: str
    whole: tuple[int, ...]
    rows: range
    columns: range | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the slice."""
        rest = self.whole[1:] if self.columns is None else (len(self.columns),)
        return (len(self.rows), *rest)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model, by its name in the files."""
    return {name: part.whole for name, part in rank_slices(config, Grid(1, 1, 0)).items()}


def rank_slices(config: ModelConfig, grid: Grid) -> dict[str, TensorSlice]:
    """What a rank holds, by tensor name. Biases of output and down projections are on the first TP rank."""
    parts = [*_embedding_and_head(config, grid)]
    for layer in stage_layers(config, grid):
        parts += _attention(config, grid, f"model.layers.{layer}.")
        parts += _mlp(config, grid, layer)
    return {part.name: part for part in parts}


def vocab_rows(config: ModelConfig, grid: Grid) -> int:
    """How many rows of embedding and LM head a rank holds. The last ranks pad theirs with zeros."""
    return -(-config.vocab_size // grid.tp)


def _embedding_and_head(c: ModelConfig, grid: Grid) -> Iterator[TensorSlice]:
    rows = vocab_rows(c, grid)
    start = grid.tp_rank * rows
    vocab = range(min(start, c.vocab_size), min(start + rows, c.vocab_size))
    matrix = (c.vocab_size, c.hidden_size)
    if grid.is_first_stage or (grid.is_last_stage and c.tied_embeddings):
        yield TensorSlice(EMBEDDING, matrix, vocab)
    if grid.is_last_stage:
        yield _whole_vector(FINAL_NORM, c.hidden_size)
        if not c.tied_embeddings:
            yield TensorSlice(HEAD, matrix, vocab)


def _attention(c: ModelConfig, grid: Grid, prefix: str) -> Iterator[TensorSlice]:
    heads, kv_heads = c.num_heads // grid.tp, max(1, c.num_kv_heads // grid.tp)
    first_kv = grid.tp_rank * c.num_kv_heads // grid.tp
    q = range(grid.tp_rank * heads * c.head_dim, (grid.tp_rank + 1) * heads * c.head_dim)
    kv = range(first_kv * c.head_dim, (first_kv + kv_heads) * c.head_dim)
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield _whole_vector(f"{prefix}input_layernorm.weight", c.hidden_size)
    for name, size, rows in (("q_proj", q_size, q), ("k_proj", kv_size, kv), ("v_proj", kv_size, kv)):
        yield TensorSlice(f"{prefix}self_attn.{name}.weight", (size, c.hidden_size), rows)
        if c.qkv_bias:
            yield TensorSlice(f"{prefix}self_attn.{name}.bias", (size,), rows)
    if c.qk_norm:
        yield _whole_vector(f"{prefix}self_attn.q_norm.weight", c.head_dim)
        yield _whole_vector(f"{prefix}self_attn.k_norm.weight", c.head_dim)
    yield TensorSlice(f"{prefix}self_attn.o_proj.weight", (c.hidden_size, q_size), range(c.hidden_size), q)
    if c.out_bias and grid.tp_rank == 0:  # only one rank may add it: the ranks' results are summed
        yield _whole_vector(f"{prefix}self_attn.o_proj.bias", c.hidden_size)
    yield _whole_vector(f"{prefix}post_attention_layernorm.weight", c.hidden_size)


def _mlp(c: ModelConfig, grid: Grid, layer: int) -> Iterator[TensorSlice]:
    prefix, moe = f"model.layers.{layer}.", c.layers[layer].moe
    if moe is None:
        names = ("gate_proj", "up_proj", "down_proj")
        yield from _gated_mlp(c, grid, f"{prefix}mlp.", names, c.intermediate_size, bias=c.mlp_bias)
        return
    prefix = f"{prefix}{moe.block_name}."
    yield TensorSlice(f"{prefix}gate.weight", (moe.experts, c.hidden_size), range(moe.experts))
    names = (moe.gate_name, moe.up_name, moe.down_name)
    for expert in range(moe.experts):
        yield from _gated_mlp(c, grid, f"{prefix}experts.{expert}.", names, moe.intermediate_size, bias=False)


def _gated_mlp(
    c: ModelConfig, grid: Grid, prefix: str, names: tuple[str, str, str], size: int, *, bias: bool
) -> Iterator[TensorSlice]:
    share = size // grid.tp
    part = range(grid.tp_rank * share, (grid.tp_rank + 1) * share)
    *gate_up, down = names
    for name in gate_up:
        yield TensorSlice(f"{prefix}{name}.weight", (size, c.hidden_size), part)
        if bias:
            yield TensorSlice(f"{prefix}{name}.bias", (size,), part)
    yield TensorSlice(f"{prefix}{down}.weight", (c.hidden_size, size), range(c.hidden_size), part)
    if bias and grid.tp_rank == 0:
        yield _whole_vector(f"{prefix}{down}.bias", c.hidden_size)


def _whole_vector(name: str, size: int) -> TensorSlice:
    return TensorSlice(name, (size,), range(size))
