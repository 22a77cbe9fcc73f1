"""The layouts that a model can fall back to when there are too few devices for the one that was asked for.

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
    """A tensor and a pipeline parallel size. `weights`: numbers that the rank with the most of them holds."""

    tp: int
    pp: int
    weights: int


def smaller_layouts(model_dir: str | Path, config: ModelConfig, tp: int, pp: int) -> tuple[Layout, ...]:
    """Every layout of fewer ranks that the model can run in, the one to take first in front.

    That is the one with the most ranks; of these the one with the most tensor parallel ones: with as many as
    before, sums are taken in the same order, and a request goes on with the very bits that it began with.
    Empty for a directory that was sharded for one layout.

    Raises:
        ModelError: INVALID_MODEL, when the directory's manifest cannot be read.
    """
    if read_manifest(model_dir) is not None:
        return ()
    sizes = [size for size in smaller_sizes(tp, pp) if _runs(config, *size)]
    return tuple(Layout(*size, most_weights(config, *size)) for size in sizes)


def smaller_sizes(tp: int, pp: int) -> list[tuple[int, int]]:
    """The same of a model that nothing is known of."""
    divisors = [size for size in range(1, tp + 1) if tp % size == 0]
    sizes = [(size, stages) for size in divisors for stages in range(1, pp + 1) if (size, stages) != (tp, pp)]
    return sorted(sizes, key=lambda size: (-size[0] * size[1], -size[0]))


def most_weights(config: ModelConfig, tp: int, pp: int) -> int:
    """Numbers in the matrices of the rank that has the most of them."""
    costs = tuple(layer_weights(config, layer) for layer in config.layers)
    vocabulary = config.vocab_size * config.hidden_size
    stages = [sum(costs[layer] for layer in layers) for layers in split(costs, vocabulary, pp)]
    stages[0] += vocabulary
    if pp > 1 or not config.tied_embeddings:
        stages[-1] += vocabulary
    return -(-max(stages) // tp)


def _runs(config: ModelConfig, tp: int, pp: int) -> bool:
    try:
        check_layout(config, tp, pp)
    except ModelError:
        return False
    return True
