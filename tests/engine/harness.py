"""One rank's model without a scheduler: plans in, logits out."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.config import BLOCK_SIZE
from engine.distributed.parallel import Parallel
from engine.execution.decoder import Decoder
from engine.execution.step_input import StepInputBuilder
from engine.grid import Grid
from engine.kernels.choose import choose_kernels
from engine.kernels.interface import Kernels
from engine.plan import NewSequence, SequenceChunk, StepPlan
from engine.request import SamplingParams
from engine.weights.loader import load_weights
from engine.weights.model_config import ModelConfig

CPU = torch.device("cpu")
BLOCKS = 160
MAX_SEQUENCES = 64


class Harness:
    """Feeds chunks of several sequences step by step; returns the logits of each chunk's last token."""

    def __init__(
        self, directory: Path, dtype: torch.dtype = torch.float32, kernels: Kernels | None = None
    ) -> None:
        config = ModelConfig.load(directory)
        grid = Grid(1, 1, 0)
        kernels = kernels or choose_kernels(CPU, dtype)
        weights = load_weights(str(directory), config, grid, kernels)
        cache = kernels.cache(config.num_layers, config.num_kv_heads, config.head_dim, BLOCKS)
        self._model = Decoder(config, weights, Parallel(grid), kernels, cache, config.max_position)
        self._inputs = StepInputBuilder(MAX_SEQUENCES, BLOCKS, kernels.device)
        self._free = list(range(BLOCKS))
        self._lengths: dict[int, int] = {}
        self._steps = 0

    def step(self, chunks: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """Feed the next tokens of each sequence, new ones included; returns each one's logits, [V]."""
        new_sequences, rows = [], []
        for slot, tokens in chunks.items():
            start = self._lengths.get(slot, 0)
            if slot not in self._lengths:
                new_sequences.append(NewSequence(slot, 0, 0, SamplingParams()))
            end = start + len(tokens)
            count = -(-end // BLOCK_SIZE) - -(-start // BLOCK_SIZE)
            blocks = tuple(self._free.pop() for _ in range(count))
            rows.append(SequenceChunk(slot, start, tuple(tokens), blocks, sample=True))
            self._lengths[slot] = end
        self._steps += 1
        with torch.inference_mode():
            plan = StepPlan(1, self._steps, (), tuple(new_sequences), tuple(rows))
            tensors = self._inputs.to_tensors(self._inputs.build(plan))
            logits = self._model.logits(tensors.sample_rows_S, self._model.forward(tensors))
        return dict(zip(chunks, logits, strict=True))
