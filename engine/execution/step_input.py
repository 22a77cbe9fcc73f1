"""Turns a plan into the model's input: integers on the host, then tensors on the device.

Shapes: T tokens of a step, S rows that sample, B sequences of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch

from engine.kernels.interface import AttentionInput
from engine.kernels.sample import SampleSpec
from engine.kernels.transfer import to_device
from engine.plan import PENDING_TOKEN, NewSequence, StepPlan
from engine.sampling.logprobs import PromptRows


@dataclass(slots=True)
class StepInput:
    """A step's input as integers on the host; `StepTensors` are the same numbers on the device.

    `sequences` has four numbers per sequence, see `AttentionInput`. `sample_rows` are the rows whose next
    token is sampled, and `specs` say how. `prompts` are the rows that give log-probabilities of a prompt.
    """

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    sequences: list[int]
    sample_rows: list[int]
    specs: tuple[SampleSpec, ...] = ()
    prompts: tuple[PromptRows, ...] = ()
    max_queries: int = 0
    num_single_queries: int = 0
    has_pending_tokens: bool = False

    @property
    def device_lists(self) -> tuple[list[int], ...]:
        """The lists that go to the device."""
        return self.token_ids, self.positions, self.slots, self.sequences, self.sample_rows

    @property
    def numbers(self) -> list[int]:
        """All `device_lists` in one list, so that one copy transfers them."""
        return [*chain(*self.device_lists)]


class SlotTensors:
    """Device tensors with a row per slot. Their addresses never change, so CUDA graphs may use them.

    `block_tables` [slots, blocks]. `last_token_ids` [slots + 1]: the last token sampled on the device. The
    last entry belongs to the padding rows of a CUDA graph, whose slot is -1.
    """

    def __init__(self, slots: int, blocks_per_sequence: int, device: torch.device) -> None:
        self.block_tables = torch.zeros(slots, blocks_per_sequence, dtype=torch.int32, device=device)
        self.last_token_ids = torch.zeros(slots + 1, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step's input on the device. `sample_rows_S`: the rows whose next token is sampled."""

    token_ids_T: torch.Tensor
    attention: AttentionInput
    sample_rows_S: torch.Tensor

    @staticmethod
    def of(step_input: StepInput, numbers: torch.Tensor, slot_tensors: SlotTensors) -> StepTensors:
        """Split `numbers`, the device's copy of `step_input.numbers`, and fill in the pending tokens."""
        parts = torch.split(numbers, [len(each) for each in step_input.device_lists])
        token_ids_T, positions_T, slots_T, sequences, sample_rows_S = parts
        if step_input.has_pending_tokens:
            last_T = slot_tensors.last_token_ids[slots_T]
            token_ids_T = torch.where(token_ids_T == PENDING_TOKEN, last_T, token_ids_T)
        attention = AttentionInput(
            positions_T,
            slots_T,
            sequences.view(-1, 4),
            slot_tensors.block_tables,
            step_input.max_queries,
            step_input.num_single_queries,
        )
        return StepTensors(token_ids_T, attention, sample_rows_S)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.token_ids_T.shape[0])

    def store_sampled(self, ids_S: torch.Tensor, slot_tensors: SlotTensors) -> None:
        """Store sampled ids on the device: the next step reads its pending tokens there."""
        slots_S = self.attention.slots_T[self.sample_rows_S]
        slot_tensors.last_token_ids[slots_S] = ids_S.to(slot_tensors.last_token_ids.dtype)


class StepInputBuilder:
    """Applies plans in order and builds each step's input.

    Owns: this rank's state of each slot: its sequence, its block table, its last sampled token. Does not own:
    any decision; the plans contain them all.
    """

    def __init__(self, slots: int, blocks_per_sequence: int, device: torch.device) -> None:
        self._device = device
        self.slot_tensors = SlotTensors(slots, blocks_per_sequence, device)
        self._num_blocks = [0] * slots
        self._sequences: dict[int, NewSequence] = {}

    def to_tensors(self, step_input: StepInput) -> StepTensors:
        """Copy an input to the device, in one transfer."""
        return StepTensors.of(step_input, to_device(step_input.numbers, self._device), self.slot_tensors)

    def build(self, plan: StepPlan) -> StepInput:
        """Apply a plan's changes to slots and block tables, and lay out the rows of its chunks."""
        for slot in plan.freed_slots:
            del self._sequences[slot]
            self._num_blocks[slot] = 0
        for new in plan.new_sequences:
            self._sequences[new.slot] = new
        result = StepInput([], [], [], [], [])
        specs: list[SampleSpec] = []
        prompts: list[PromptRows] = []
        table_indices: list[int] = []  # where the blocks that this plan adds go in the flat block tables
        blocks: list[int] = []
        table_len = self.slot_tensors.block_tables.shape[1]
        for index, chunk in enumerate(plan.chunks):
            if chunk.blocks:
                first = chunk.slot * table_len + self._num_blocks[chunk.slot]
                table_indices += range(first, first + len(chunk.blocks))
                blocks += chunk.blocks
                self._num_blocks[chunk.slot] += len(chunk.blocks)
            count, first_row = len(chunk.token_ids), len(result.token_ids)
            end = chunk.start + count
            result.sequences += (chunk.slot, first_row, count, chunk.start)
            result.max_queries = max(result.max_queries, count)
            result.num_single_queries += count == 1
            result.token_ids += chunk.token_ids
            result.positions += range(chunk.start, end)
            result.slots += [chunk.slot] * count
            sequence = self._sequences[chunk.slot]
            if sequence.prompt_logprobs is not None and chunk.start + 1 < sequence.prompt_len:
                targets = sequence.prompt_ids[chunk.start + 1 : end + 1]
                prompts.append(PromptRows(index, first_row, targets, sequence.prompt_logprobs))
            if chunk.sample:
                position = end - sequence.prompt_len
                specs.append(
                    SampleSpec(sequence.sampling, sequence.choice, position, sequence.logprobs, chunk.slot)
                )
                result.sample_rows.append(first_row + count - 1)
        result.specs, result.prompts = tuple(specs), tuple(prompts)
        if table_indices:
            update = to_device(table_indices + blocks, self._device).view(2, -1)
            self.slot_tensors.block_tables.view(-1)[update[0]] = update[1]
        result.has_pending_tokens = PENDING_TOKEN in result.token_ids
        return result
