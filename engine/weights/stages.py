"""Which layers each pipeline stage has. Imports no torch.

A stage's time in a decode step is about that of reading its weights, so stages are cut to have as many of
them. The LM head counts, and may be worth several layers; the embedding does not: a step reads a row of it
per token. Mixtures of experts count whole, as a batch comes to use most of them.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate

from engine.grid import Grid
from engine.weights.model_config import LayerConfig, ModelConfig


def stage_layers(config: ModelConfig, grid: Grid) -> range:
    """The layers of this rank's stage."""
    costs = tuple(layer_weights(config, layer) for layer in config.layers)
    return split(costs, config.vocab_size * config.hidden_size, grid.pp)[grid.pp_rank]


@cache
def split(costs: tuple[int, ...], head: int, stages: int) -> tuple[range, ...]:
    """Cut layers into stages so that the costliest is as cheap as can be, and then all are as even as can be.

    Args:
        costs: of each layer.
        head: what the last stage has to do besides.
        stages: at most as many as there are layers, since none is left empty.

    Of cuts that are equally good, the first stages have the most layers.
    """
    sums = tuple(accumulate(costs, initial=0))

    def cost(stage: int, start: int, end: int) -> int:
        return sums[end] - sums[start] + (head if stage == stages - 1 else 0)

    # Both for every number of layers that the stages so far may have.
    costliest = {0: 0}
    for stage in range(stages):
        costliest = {
            end: min(max(most, cost(stage, start, end)) for start, most in costliest.items() if start < end)
            for end in _ends(len(costs), stages, stage)
        }
    limit = costliest[len(costs)]
    # The sum of squares, and where stages begin: negative, so that of equals the least is the one to keep.
    evenest: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for stage in range(stages):
        evenest = {
            end: min(cuts)
            for end in _ends(len(costs), stages, stage)
            if (
                cuts := [
                    (squares + cost(stage, start, end) ** 2, (*starts, -start))
                    for start, (squares, starts) in evenest.items()
                    if start < end and cost(stage, start, end) <= limit
                ]
            )
        }
    starts = [-start for start in evenest[len(costs)][1]]
    return tuple(range(start, end) for start, end in zip(starts, [*starts[1:], len(costs)], strict=True))


def _ends(layers: int, stages: int, stage: int) -> range:
    """Where a stage may end: a layer is left for each of the others."""
    return range(layers if stage == stages - 1 else stage + 1, layers - stages + stage + 2)


def layer_weights(config: ModelConfig, layer: LayerConfig) -> int:
    """Weights of a layer's matrices."""
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = 2 * config.hidden_size * (query + kv)
    if layer.moe is None:
        return attention + 3 * config.hidden_size * config.intermediate_size
    return attention + layer.moe.experts * config.hidden_size * (1 + 3 * layer.moe.intermediate_size)
