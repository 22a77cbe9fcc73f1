"""Turns plans into the tensors of a step.

Owns: what this rank knows of each handle: its block table, where its output begins, how it is sampled.
Does not own: any decision; everything comes from the plans.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.draw import Draw
from engine.kernels import AttentionInput
from engine.plan import Join, StepPlan
from engine.sampler import PromptRows


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's input. sample_rows_S: rows whose next token is drawn. `prompts`: rows to score."""

    token_ids_T: torch.Tensor
    attention: AttentionInput
    sample_rows_S: torch.Tensor
    draws: tuple[Draw, ...]
    prompts: tuple[PromptRows, ...] = ()

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.token_ids_T.shape[0])


class Batcher:
    """Applies plans in order and builds a Batch from each. Block tables stay where they are."""

    def __init__(self, handles: int, blocks_per_sequence: int, device: torch.device) -> None:
        self._device = device
        self._tables = torch.zeros(handles, blocks_per_sequence, dtype=torch.int32)
        self._tables_there = self._tables.to(device)  # the same memory on a CPU
        self._filled = [0] * handles
        self._joins: dict[int, Join] = {}

    def build(self, plan: StepPlan) -> Batch:
        """Take in what the plan says about handles and lay out its rows."""
        for handle in plan.leaves:
            del self._joins[handle]
            self._filled[handle] = 0
        for join in plan.joins:
            self._joins[join.handle] = join
        token_ids: list[int] = []
        positions: list[int] = []
        sequences: list[tuple[int, int, int, int]] = []
        draws: list[Draw] = []
        sample_rows: list[int] = []
        prompts: list[PromptRows] = []
        for index, row in enumerate(plan.rows):
            if row.blocks:
                self._append(row.handle, row.blocks)
            count = len(row.token_ids)
            end = row.start + count
            sequences.append((row.handle, len(token_ids), count, row.start))
            token_ids.extend(row.token_ids)
            positions.extend(range(row.start, end))
            join = self._joins[row.handle]
            if join.prompt_logprobs is not None and row.start + 1 < join.prompt_len:
                targets = join.prompt_ids[row.start + 1 : end + 1]
                prompts.append(PromptRows(index, len(token_ids) - count, targets, join.prompt_logprobs))
            if row.sample:
                position = end - join.prompt_len
                draws.append(Draw(join.sampling, join.choice, position, join.logprobs, row.handle))
                sample_rows.append(len(token_ids) - 1)
        inputs = AttentionInput(
            torch.tensor(positions, dtype=torch.int32, device=self._device),
            torch.tensor(sequences, dtype=torch.int32, device=self._device),
            self._tables_there,
        )
        return Batch(
            torch.tensor(token_ids, dtype=torch.int64, device=self._device),
            inputs,
            torch.tensor(sample_rows, dtype=torch.int64, device=self._device),
            tuple(draws),
            tuple(prompts),
        )

    def _append(self, handle: int, blocks: tuple[int, ...]) -> None:
        start = self._filled[handle]
        end = self._filled[handle] = start + len(blocks)
        self._tables[handle, start:end] = torch.tensor(blocks, dtype=torch.int32)
        if self._tables_there is not self._tables:
            self._tables_there[handle, start:end] = self._tables[handle, start:end].to(self._device)
