"""A model's tensors: their names in the files, their shapes, and which slices of them a rank holds.

Names are those of the checkpoints that are published. Shapes are [out, in]. Tensor parallelism cuts
query, key, value, gate, up, the embedding and the LM head by rows and the output and down projections
by columns. KV heads are replicated when there are fewer of them than ranks. Each expert is cut like
an MLP, not given whole to a rank: every rank then has the same work whatever the router chooses, a
token's weights are read by all ranks at once, and no token travels. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from engine.grid import Grid
from engine.weights.checkpoint import ITEM_SIZES, Entry
from engine.weights.model_config import ModelConfig
from engine.weights.stages import stage_layers

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

_FUSED = re.compile(r"(model\.layers\.\d+\.)mlp\.(gate\.weight|experts\.(gate_up_proj|down_proj))")


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a tensor, and columns of them (None: all), that a rank holds."""

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
    """Every tensor of the model by its name in the files."""
    return {name: part.whole for name, part in rank_slices(config, Grid(1, 1, 0)).items()}


def rank_slices(config: ModelConfig, grid: Grid) -> dict[str, Slice]:
    """What a rank holds, by name. Biases of output and down projections are the first TP rank's."""
    parts = [*_ends(config, grid)]
    for layer in stage_layers(config, grid):
        parts += _attention(config, grid, f"model.layers.{layer}.")
        parts += _mlp(config, grid, layer)
    return {part.name: part for part in parts}


def vocab_rows(config: ModelConfig, grid: Grid) -> int:
    """Rows of a rank's share of the embedding and the LM head; the last ranks fill up with zeros."""
    return -(-config.vocab_size // grid.tp)


def defuse(config: ModelConfig, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The published names for experts that were saved as one tensor per layer, as transformers holds them.

    `experts.gate_up_proj` is [experts, 2 F, D], gate over up; `experts.down_proj` is [experts, D, F].
    """
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        match = _FUSED.fullmatch(name)
        layer = int(name.split(".")[2]) if match else -1
        moe = config.layers[layer].moe if 0 <= layer < config.num_layers else None
        if match is None or moe is None:
            found[name] = entry
            continue
        prefix = f"{match[1]}{moe.block_name}."
        if match[3] is None:
            found[f"{prefix}gate.weight"] = entry
            continue
        names = [moe.down_name] if match[3] == "down_proj" else [moe.gate_name, moe.up_name]
        if len(entry.shape) != 3 or entry.shape[1] % len(names):
            found[name] = entry
            continue
        experts, rows, columns = entry.shape
        rows //= len(names)
        size = rows * columns * ITEM_SIZES.get(entry.dtype, 0)
        for index in range(experts * len(names)):
            part = replace(entry, shape=(rows, columns), start=entry.start + index * size)
            found[f"{prefix}experts.{index // len(names)}.{names[index % len(names)]}.weight"] = part
    return found


def _ends(c: ModelConfig, grid: Grid) -> Iterator[Slice]:
    rows = vocab_rows(c, grid)
    start = grid.tp_rank * rows
    vocab = range(min(start, c.vocab_size), min(start + rows, c.vocab_size))
    matrix = (c.vocab_size, c.hidden_size)
    if grid.is_first_stage or (grid.is_last_stage and c.tied_embeddings):
        yield Slice(EMBEDDING, matrix, vocab)
    if grid.is_last_stage:
        yield _whole(FINAL_NORM, c.hidden_size)
        if not c.tied_embeddings:
            yield Slice(HEAD, matrix, vocab)


def _attention(c: ModelConfig, grid: Grid, prefix: str) -> Iterator[Slice]:
    heads, kv_heads = c.num_heads // grid.tp, max(1, c.num_kv_heads // grid.tp)
    first_kv = grid.tp_rank * c.num_kv_heads // grid.tp
    q = range(grid.tp_rank * heads * c.head_dim, (grid.tp_rank + 1) * heads * c.head_dim)
    kv = range(first_kv * c.head_dim, (first_kv + kv_heads) * c.head_dim)
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield _whole(f"{prefix}input_layernorm.weight", c.hidden_size)
    for name, size, rows in (("q_proj", q_size, q), ("k_proj", kv_size, kv), ("v_proj", kv_size, kv)):
        yield Slice(f"{prefix}self_attn.{name}.weight", (size, c.hidden_size), rows)
        if c.qkv_bias:
            yield Slice(f"{prefix}self_attn.{name}.bias", (size,), rows)
    if c.qk_norm:
        yield _whole(f"{prefix}self_attn.q_norm.weight", c.head_dim)
        yield _whole(f"{prefix}self_attn.k_norm.weight", c.head_dim)
    yield Slice(f"{prefix}self_attn.o_proj.weight", (c.hidden_size, q_size), range(c.hidden_size), q)
    if c.out_bias and grid.tp_rank == 0:  # it is added once, before the sum over ranks
        yield _whole(f"{prefix}self_attn.o_proj.bias", c.hidden_size)
    yield _whole(f"{prefix}post_attention_layernorm.weight", c.hidden_size)


def _mlp(c: ModelConfig, grid: Grid, layer: int) -> Iterator[Slice]:
    prefix, moe = f"model.layers.{layer}.", c.layers[layer].moe
    if moe is None:
        names = ("gate_proj", "up_proj", "down_proj")
        yield from _gated(c, grid, f"{prefix}mlp.", names, c.intermediate_size, bias=c.mlp_bias)
        return
    prefix = f"{prefix}{moe.block_name}."
    yield Slice(f"{prefix}gate.weight", (moe.experts, c.hidden_size), range(moe.experts))
    names = (moe.gate_name, moe.up_name, moe.down_name)
    for expert in range(moe.experts):
        yield from _gated(c, grid, f"{prefix}experts.{expert}.", names, moe.intermediate_size, bias=False)


def _gated(
    c: ModelConfig, grid: Grid, prefix: str, names: tuple[str, str, str], size: int, *, bias: bool
) -> Iterator[Slice]:
    share = size // grid.tp
    part = range(grid.tp_rank * share, (grid.tp_rank + 1) * share)
    *gate_up, down = names
    for name in gate_up:
        yield Slice(f"{prefix}{name}.weight", (size, c.hidden_size), part)
        if bias:
            yield Slice(f"{prefix}{name}.bias", (size,), part)
    yield Slice(f"{prefix}{down}.weight", (c.hidden_size, size), range(c.hidden_size), part)
    if bias and grid.tp_rank == 0:
        yield _whole(f"{prefix}{down}.bias", c.hidden_size)


def _whole(name: str, size: int) -> Slice:
    return Slice(name, (size,), range(size))
