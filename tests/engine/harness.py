"""One rank's model without a scheduler: plans in, logits out."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.attention import KVCache
from engine.batch import Batcher, min_rows
from engine.config import BLOCK_SIZE, ModelConfig
from engine.model import Llama
from engine.parallel import Grid, Parallel
from engine.plan import Join, Row, StepPlan
from engine.request import SamplingParams
from engine.weights import load_weights

CPU = torch.device("cpu")
BLOCKS = 160


class Harness:
    """Feeds tokens of several sequences step by step; every fed chunk's last token gives logits."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        config = ModelConfig.load(directory)
        grid = Grid(1, 1, 0)
        weights = load_weights(str(directory), config, grid, dtype, CPU)
        cache = KVCache(
            config.num_layers, config.num_kv_heads, config.head_dim, BLOCKS, BLOCK_SIZE, dtype, CPU
        )
        self._model = Llama(config, weights, Parallel(grid), cache, config.max_position)
        queries = config.num_heads // config.num_kv_heads
        self._batcher = Batcher(BLOCK_SIZE, queries, cache.padding_place, min_rows(dtype, CPU), CPU)
        self._free = list(range(BLOCKS))
        self._lengths: dict[int, int] = {}
        self._steps = 0

    def step(self, chunks: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """Feed the next tokens of each sequence, new ones included; returns each one's logits, [V]."""
        joins, rows = [], []
        for handle, tokens in chunks.items():
            start = self._lengths.get(handle, 0)
            if handle not in self._lengths:
                joins.append(Join(handle, 0, 0, SamplingParams()))
            end = start + len(tokens)
            count = -(-end // BLOCK_SIZE) - -(-start // BLOCK_SIZE)
            blocks = tuple(self._free.pop() for _ in range(count))
            rows.append(Row(handle, start, tuple(tokens), blocks, sample=True))
            self._lengths[handle] = end
        self._steps += 1
        with torch.inference_mode():
            batch = self._batcher.build(StepPlan(1, self._steps, (), tuple(joins), tuple(rows)))
            logits = self._model.logits(batch, self._model.forward(batch))
        return dict(zip(chunks, logits, strict=False))
