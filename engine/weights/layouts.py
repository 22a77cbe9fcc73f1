"""Smaller layouts of a model, for a replica that has lost devices: TP and PP sizes and their memory needs.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.errors import ModelError
from engine.weights.manifest import read_manifest
from engine.weights.model_config import ModelConfig, check_layout
from engine.weights.stages import layer_weights, split


@dataclass(frozen=True, slots=True)
class Layout:
    """A TP and a PP size. `weights`: maximum number of weights that a rank holds."""

    tp: int
    pp: int
    weights: int


def smaller_layouts(model_dir: str | Path, config: ModelConfig, tp: int, pp: int) -> tuple[Layout, ...]:
    """Every smaller layout that the model can run in, in order of preference.

    Layouts with more ranks come first. Among these, layouts with a higher TP size come first: with the
    same TP as before, sums are added in the same order, so a request continues with the same bits. Empty
    for a sharded directory, which has one layout only.

    Raises:
        ModelError: INVALID_MODEL, when the directory's manifest cannot be read.
    """
    if read_manifest(model_dir) is not None:
        return ()
    sizes = [size for size in smaller_sizes(tp, pp) if _can_run(config, *size)]
    return tuple(Layout(*size, max_rank_weights(config, *size)) for size in sizes)


def smaller_sizes(tp: int, pp: int) -> list[tuple[int, int]]:
    """The (TP, PP) sizes of all smaller layouts, in the same order, whatever the model."""
    divisors = [size for size in range(1, tp + 1) if tp % size == 0]
    sizes = [(size, stages) for size in divisors for stages in range(1, pp + 1) if (size, stages) != (tp, pp)]
    return sorted(sizes, key=lambda size: (-size[0] * size[1], -size[0]))


def max_rank_weights(config: ModelConfig, tp: int, pp: int) -> int:
    """Maximum number of weights that a rank holds in its matrices."""
    costs = tuple(layer_weights(config, layer) for layer in config.layers)
    vocabulary = config.vocab_size * config.hidden_size
    stages = [sum(costs[layer] for layer in layers) for layers in split(costs, vocabulary, pp)]
    stages[0] += vocabulary
    if pp > 1 or not config.tied_embeddings:
        stages[-1] += vocabulary
    return -(-max(stages) // tp)


def _can_run(config: ModelConfig, tp: int, pp: int) -> bool:
    try:
        check_layout(config, tp, pp)
    except ModelError:
        return False
    return True
