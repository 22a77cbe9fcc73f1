"""Turns plans into the tensors of a step.

Owns: what this rank knows of each handle: its block table, where its output begins, how it is sampled.
Does not own: any decision; everything comes from the plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch

from engine.kernels import AttentionInput
from engine.kernels.draw import Draw
from engine.kernels.transfer import to_device
from engine.plan import DRAWN, Join, StepPlan
from engine.sampling.sampler import PromptRows


@dataclass(slots=True)
class Layout:
    """A step's input as integers; see `Batch` and `AttentionInput`. `sequences` has four for each."""

    token_ids: list[int]
    positions: list[int]
    handles: list[int]
    sequences: list[int]
    sample_rows: list[int]
    draws: tuple[Draw, ...] = ()
    prompts: tuple[PromptRows, ...] = ()
    most_queries: int = 0
    single_queries: int = 0
    drawn: bool = False  # some token is DRAWN

    @property
    def lists(self) -> tuple[list[int], ...]:
        """Those that go to the device."""
        return self.token_ids, self.positions, self.handles, self.sequences, self.sample_rows

    @property
    def numbers(self) -> list[int]:
        """All of these, one after the other."""
        return [*chain(*self.lists)]


class Handles:
    """What a device keeps of every handle, at places that never change. Shapes: H handles.

    `tables`: block tables [H, blocks]. `drawn`: the token last drawn, [H + 1]; the last is of rows that
    belong to nobody, whose handle is -1.
    """

    def __init__(self, handles: int, blocks_per_sequence: int, device: torch.device) -> None:
        self.tables = torch.zeros(handles, blocks_per_sequence, dtype=torch.int32, device=device)
        self.drawn = torch.zeros(handles + 1, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's input. sample_rows_S: rows whose next token is drawn. `prompts`: rows to score."""

    token_ids_T: torch.Tensor
    attention: AttentionInput
    sample_rows_S: torch.Tensor
    draws: tuple[Draw, ...]
    prompts: tuple[PromptRows, ...] = ()

    @staticmethod
    def of(layout: Layout, numbers: torch.Tensor, known: Handles) -> Batch:
        """Give what `layout.numbers` became on the device its names; looks up what was drawn there."""
        parts = torch.split(numbers, [len(each) for each in layout.lists])
        token_ids_T, positions_T, handles_T, flat, sample_rows_S = parts
        if layout.drawn:
            token_ids_T = torch.where(token_ids_T == DRAWN, known.drawn[handles_T], token_ids_T)
        attention = AttentionInput(
            positions_T, handles_T, flat.view(-1, 4), known.tables, layout.most_queries, layout.single_queries
        )
        return Batch(token_ids_T, attention, sample_rows_S, layout.draws, layout.prompts)

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.token_ids_T.shape[0])

    def keep(self, ids_S: torch.Tensor, known: Handles) -> None:
        """Note what was drawn, for a step that asks for it."""
        known.drawn[self.attention.handles_T[self.sample_rows_S]] = ids_S.to(known.drawn.dtype)


class Batcher:
    """Applies plans in order and lays each out."""

    def __init__(self, handles: int, blocks_per_sequence: int, device: torch.device) -> None:
        self._device = device
        self.known = Handles(handles, blocks_per_sequence, device)
        self._filled = [0] * handles
        self._joins: dict[int, Join] = {}

    def batch(self, layout: Layout) -> Batch:
        """The tensors of a layout: all numbers go to the device at once."""
        return Batch.of(layout, to_device(layout.numbers, self._device), self.known)

    def read(self, plan: StepPlan) -> Layout:
        """Take in what the plan says about handles and lay out its rows."""
        for handle in plan.leaves:
            del self._joins[handle]
            self._filled[handle] = 0
        for join in plan.joins:
            self._joins[join.handle] = join
        layout = Layout([], [], [], [], [])
        draws: list[Draw] = []
        prompts: list[PromptRows] = []
        places: list[int] = []
        blocks: list[int] = []
        entries = self.known.tables.shape[1]
        for index, row in enumerate(plan.rows):
            if row.blocks:
                first = row.handle * entries + self._filled[row.handle]
                places += range(first, first + len(row.blocks))
                blocks += row.blocks
                self._filled[row.handle] += len(row.blocks)
            count, at = len(row.token_ids), len(layout.token_ids)
            end = row.start + count
            layout.sequences += (row.handle, at, count, row.start)
            layout.most_queries = max(layout.most_queries, count)
            layout.single_queries += count == 1
            layout.token_ids += row.token_ids
            layout.positions += range(row.start, end)
            layout.handles += [row.handle] * count
            join = self._joins[row.handle]
            if join.prompt_logprobs is not None and row.start + 1 < join.prompt_len:
                targets = join.prompt_ids[row.start + 1 : end + 1]
                prompts.append(PromptRows(index, at, targets, join.prompt_logprobs))
            if row.sample:
                position = end - join.prompt_len
                draws.append(Draw(join.sampling, join.choice, position, join.logprobs, row.handle))
                layout.sample_rows.append(at + count - 1)
        layout.draws, layout.prompts = tuple(draws), tuple(prompts)
        if places:
            both = to_device(places + blocks, self._device).view(2, -1)
            self.known.tables.view(-1)[both[0]] = both[1]
        layout.drawn = DRAWN in layout.token_ids
        return layout
