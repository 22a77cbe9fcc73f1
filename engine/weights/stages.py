"""Which layers each pipeline stage has. Imports no torch.

In a decode step, a stage's time is about the time to read its weights. So stages get about equal numbers
of weights. The LM head counts: it may have as many weights as several layers. The embedding does not
count: a step reads only one row of it per token. All experts of a mixture count, because a batch uses
most of them.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate

from engine.grid import Grid
from engine.weights.architectures import LayerConfig
from engine.weights.model_config import ModelConfig


def stage_layers(config: ModelConfig, grid: Grid) -> range:
    """The layers of this rank's stage."""
    costs = tuple(layer_weights(config, layer) for layer in config.layers)
    return split(costs, config.vocab_size * config.hidden_size, grid.pp)[grid.pp_rank]


@cache
def split(costs: tuple[int, ...], head: int, stages: int) -> tuple[range, ...]:
    """Cut layers into stages: minimise the maximum cost of a stage, then the sum of squared costs.

    Of equally good cuts, take the one whose first stages have the most layers. Dynamic programming over the
    number of layers before a stage's end.

    Args:
        costs: the cost of each layer.
        head: the cost of the LM head, which belongs to the last stage.
        stages: the number of stages, at most the number of layers: no stage is empty.
    """
    sums = tuple(accumulate(costs, initial=0))

    def cost(stage: int, start: int, end: int) -> int:
        return sums[end] - sums[start] + (head if stage == stages - 1 else 0)

    # By the number of layers in the stages so far: the minimum of their maximum cost.
    min_max_cost = {0: 0}
    for stage in range(stages):
        min_max_cost = {
            end: min(
                max(before, cost(stage, start, end)) for start, before in min_max_cost.items() if start < end
            )
            for end in _ends(len(costs), stages, stage)
        }
    limit = min_max_cost[len(costs)]
    # By the number of layers in the stages so far: the smallest pair of the sum of squared costs and the
    # negated starts of the stages. Of equal sums, the pair with the latest starts is the smallest: then the
    # first stages have the most layers.
    best_cuts: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for stage in range(stages):
        best_cuts = {
            end: min(cuts)
            for end in _ends(len(costs), stages, stage)
            if (
                cuts := [
                    (squares + cost(stage, start, end) ** 2, (*starts, -start))
                    for start, (squares, starts) in best_cuts.items()
                    if start < end and cost(stage, start, end) <= limit
                ]
            )
        }
    starts = [-start for start in best_cuts[len(costs)][1]]
    return tuple(range(start, end) for start, end in zip(starts, [*starts[1:], len(costs)], strict=True))


def _ends(layers: int, stages: int, stage: int) -> range:
    """The layers at which a stage may end, so that every later stage still gets one."""
    return range(layers if stage == stages - 1 else stage + 1, layers - stages + stage + 2)


def layer_weights(config: ModelConfig, layer: LayerConfig) -> int:
    """The number of weights in a layer's matrices."""
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = 2 * config.hidden_size * (query + kv)
    if layer.moe is None:
        return attention + 3 * config.hidden_size * config.intermediate_size
    return attention + layer.moe.experts * config.hidden_size * (1 + 3 * layer.moe.intermediate_size)
