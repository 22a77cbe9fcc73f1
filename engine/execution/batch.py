"""Turns plans into the tensors of a step.

Owns: what this rank knows of each slot: its block table, where its output begins, how it is sampled.
Does not own: any decision; everything comes from the plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch

from engine.kernels.draw import Draw
from engine.kernels.interface import AttentionInput
from engine.kernels.transfer import to_device
from engine.plan import PENDING_TOKEN, NewSequence, StepPlan
from engine.sampling.sampler import PromptRows


@dataclass(slots=True)
class Layout:
    """A step's input as integers; see `Batch` and `AttentionInput`. `sequences` has four for each."""

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    sequences: list[int]
    sample_rows: list[int]
    draws: tuple[Draw, ...] = ()
    prompts: tuple[PromptRows, ...] = ()
    most_queries: int = 0
    single_queries: int = 0
    drawn: bool = False  # some token is PENDING_TOKEN

    @property
    def lists(self) -> tuple[list[int], ...]:
        """Those that go to the device."""
        return self.token_ids, self.positions, self.slots, self.sequences, self.sample_rows

    @property
    def numbers(self) -> list[int]:
        """All of these, one after the other."""
        return [*chain(*self.lists)]


class SlotState:
    """What a device keeps of every slot, at places that never change. Shapes: H slots.

    `tables`: block tables [H, blocks]. `drawn`: the token last drawn, [H + 1]; the last is of rows that
    belong to nobody, whose slot is -1.
    """

    def __init__(self, slots: int, blocks_per_sequence: int, device: torch.device) -> None:
        self.tables = torch.zeros(slots, blocks_per_sequence, dtype=torch.int32, device=device)
        self.drawn = torch.zeros(slots + 1, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's input. sample_rows_S: rows whose next token is drawn. `prompts`: rows to score."""

    token_ids_T: torch.Tensor
    attention: AttentionInput
    sample_rows_S: torch.Tensor
    draws: tuple[Draw, ...]
    prompts: tuple[PromptRows, ...] = ()

    @staticmethod
    def of(layout: Layout, numbers: torch.Tensor, known: SlotState) -> Batch:
        """Give what `layout.numbers` became on the device its names; looks up what was drawn there."""
        parts = torch.split(numbers, [len(each) for each in layout.lists])
        token_ids_T, positions_T, slots_T, flat, sample_rows_S = parts
        if layout.drawn:
            token_ids_T = torch.where(token_ids_T == PENDING_TOKEN, known.drawn[slots_T], token_ids_T)
        attention = AttentionInput(
            positions_T, slots_T, flat.view(-1, 4), known.tables, layout.most_queries, layout.single_queries
        )
        return Batch(token_ids_T, attention, sample_rows_S, layout.draws, layout.prompts)

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.token_ids_T.shape[0])

    def keep(self, ids_S: torch.Tensor, known: SlotState) -> None:
        """Note what was drawn, for a step that asks for it."""
        known.drawn[self.attention.slots_T[self.sample_rows_S]] = ids_S.to(known.drawn.dtype)


class Batcher:
    """Applies plans in order and lays each out."""

    def __init__(self, slots: int, blocks_per_sequence: int, device: torch.device) -> None:
        self._device = device
        self.known = SlotState(slots, blocks_per_sequence, device)
        self._filled = [0] * slots
        self._joins: dict[int, NewSequence] = {}

    def batch(self, layout: Layout) -> Batch:
        """The tensors of a layout: all numbers go to the device at once."""
        return Batch.of(layout, to_device(layout.numbers, self._device), self.known)

    def read(self, plan: StepPlan) -> Layout:
        """Take in what the plan says about slots and lay out its rows."""
        for slot in plan.freed_slots:
            del self._joins[slot]
            self._filled[slot] = 0
        for join in plan.new_sequences:
            self._joins[join.slot] = join
        layout = Layout([], [], [], [], [])
        draws: list[Draw] = []
        prompts: list[PromptRows] = []
        places: list[int] = []
        blocks: list[int] = []
        entries = self.known.tables.shape[1]
        for index, row in enumerate(plan.chunks):
            if row.blocks:
                first = row.slot * entries + self._filled[row.slot]
                places += range(first, first + len(row.blocks))
                blocks += row.blocks
                self._filled[row.slot] += len(row.blocks)
            count, at = len(row.token_ids), len(layout.token_ids)
            end = row.start + count
            layout.sequences += (row.slot, at, count, row.start)
            layout.most_queries = max(layout.most_queries, count)
            layout.single_queries += count == 1
            layout.token_ids += row.token_ids
            layout.positions += range(row.start, end)
            layout.slots += [row.slot] * count
            join = self._joins[row.slot]
            if join.prompt_logprobs is not None and row.start + 1 < join.prompt_len:
                targets = join.prompt_ids[row.start + 1 : end + 1]
                prompts.append(PromptRows(index, at, targets, join.prompt_logprobs))
            if row.sample:
                position = end - join.prompt_len
                draws.append(Draw(join.sampling, join.choice, position, join.logprobs, row.slot))
                layout.sample_rows.append(at + count - 1)
        layout.draws, layout.prompts = tuple(draws), tuple(prompts)
        if places:
            both = to_device(places + blocks, self._device).view(2, -1)
            self.known.tables.view(-1)[both[0]] = both[1]
        layout.drawn = PENDING_TOKEN in layout.token_ids
        return layout
