from __future__ import annotations

import dataclasses
from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.grid import Grid
from engine.weights.architectures import LayerConfig, MoeConfig
from engine.weights.model_config import ModelConfig
from engine.weights.rope_config import RopeConfig
from engine.weights.stages import split, stage_layers

DENSE = LayerConfig()
CONFIG = ModelConfig(
    vocab_size=32000,
    hidden_size=2048,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=5632,
    max_position=2048,
    rms_eps=1e-5,
    rope=RopeConfig(10000.0),
    tied_embeddings=False,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    layers=(DENSE,) * 22,
    eos_token_ids=(2,),
)


def stage_sizes(config: ModelConfig, pp: int) -> list[int]:
    return [len(stage_layers(config, Grid(1, pp, rank))) for rank in range(pp)]


def costs_of(cut: tuple[range, ...], costs: list[int], head: int) -> list[int]:
    totals = [sum(costs[layer] for layer in stage) for stage in cut]
    totals[-1] += head
    return totals


@given(st.data())
def test_no_other_cut_has_a_cheaper_costliest_stage_nor_evener_ones(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    stages = data.draw(st.integers(1, len(costs)))
    head = data.draw(st.integers(0, 20))
    cut = split(tuple(costs), head, stages)
    others = [
        tuple(range(start, end) for start, end in pairwise([0, *ends, len(costs)]))
        for ends in combinations(range(1, len(costs)), stages - 1)
    ]

    def rank(cut: tuple[range, ...]) -> tuple[int, int]:
        totals = costs_of(cut, costs, head)
        return max(totals), sum(total**2 for total in totals)

    assert cut in others
    assert rank(cut) == min(map(rank, others))


def test_where_it_makes_no_difference_the_first_stages_have_the_most_layers() -> None:
    assert [len(stage) for stage in split((1,) * 7, 0, 3)] == [3, 2, 2]


def test_the_stage_with_the_head_has_fewer_layers() -> None:
    assert stage_sizes(CONFIG, 2) == [12, 10]
    assert stage_sizes(dataclasses.replace(CONFIG, vocab_size=1000), 2) == [11, 11]


def test_a_stage_of_dense_layers_has_more_than_one_of_experts() -> None:
    moe = MoeConfig(8, 2, 5632, True, "mlp", "gate", "up", "down")
    layers = (DENSE,) * 11 + (LayerConfig(moe=moe),) * 11
    sizes = stage_sizes(dataclasses.replace(CONFIG, layers=layers), 2)
    assert sizes == [16, 6]
