"""Changes a row's logits before a token is sampled from them: grammar, min_tokens, bias, penalties.

Shapes: S rows, V vocabulary.

Where is EOS suppressed? Here, by `min_tokens`: until the output has that many tokens, `_ban` sets the logits
of the sequence's `ends` to minus infinity. `ends` are the stop ids and, without `ignore_eos`, EOS
(`new_sequence` in engine/scheduling/plan_draft.py). `ignore_eos` suppresses nothing: EOS is sampled like any
token, and does not end the sequence (`Sequence.finish_reason` in engine/scheduling/sequence.py).

The order is that of vLLM:
1. the grammar's mask;
2. bad words, and `ends` before `min_tokens`;
3. logit bias;
4. repetition penalty, then frequency and presence penalty.
Temperature and truncation follow in engine/kernels/sample.py. All arithmetic is in float32 and element by
element, so that a row gets the same bits in every batch.

The result is a function of ids alone: those of the prompt and of the output. So a preempted or replayed
sequence gets the same logits as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from engine.plan import Mask, NewSequence, StepPlan

_INITIAL_ROOM = 16  # new tokens that fit before the tensors grow
_ZEROS_OF_BYTES = (torch.arange(256)[:, None] >> torch.arange(8)) & 1 == 0


@dataclass(slots=True)
class _TokenCounts:
    """The distinct tokens of prompt and output, and how often each is in the output. Grows by doubling."""

    ids: torch.Tensor
    counts: torch.Tensor
    size: int
    index_of: dict[int, int]

    @staticmethod
    def of(prompt: Iterable[int], output: Iterable[int]) -> _TokenCounts:
        """Count a prompt and an output."""
        counts = dict.fromkeys(prompt, 0)
        for token in output:
            counts[token] = counts.get(token, 0) + 1
        room = [0] * max(_INITIAL_ROOM, len(counts))
        return _TokenCounts(
            torch.tensor([*counts, *room], dtype=torch.int64),
            torch.tensor([*counts.values(), *room], dtype=torch.float32),
            len(counts),
            {token: index for index, token in enumerate(counts)},
        )

    def add(self, token: int) -> None:
        """Count one more token of the output."""
        index = self.index_of.get(token)
        if index is None:
            index = self.index_of[token] = self.size
            if index == len(self.ids):
                self.ids = torch.cat((self.ids, torch.zeros_like(self.ids)))
                self.counts = torch.cat((self.counts, torch.zeros_like(self.counts)))
            self.ids[index] = token
            self.size += 1
        self.counts[index] += 1


@dataclass(slots=True)
class _SequenceState:
    """The state of one sequence's logits processors."""

    sequence: NewSequence
    output: list[int]
    token_counts: _TokenCounts | None  # None without penalties
    always_banned: tuple[int, ...]
    bias_ids: torch.Tensor
    bias_values: torch.Tensor


class LogitsProcessors:
    """The logits processors of all running sequences.

    Owns: for each slot with logits processors, the tokens that they depend on. Does not own: grammars. A slot
    without logits processors costs one dictionary lookup per step.
    """

    def __init__(self) -> None:
        self._slots: dict[int, _SequenceState] = {}

    def update_slots(self, plan: StepPlan) -> None:
        """Forget the plan's freed slots, then add its new sequences."""
        for slot in plan.freed_slots:
            self._slots.pop(slot, None)
        for sequence in plan.new_sequences:
            if sequence.sampling.has_logits_processors:
                self._slots[sequence.slot] = _begin(sequence)

    def append_token(self, slot: int, token: int) -> None:
        """Append a sampled token to the output of the sequence in a slot."""
        state = self._slots.get(slot)
        if state is not None:
            state.output.append(token)
            if state.token_counts is not None:
                state.token_counts.add(token)

    def apply(
        self, logits_SV: torch.Tensor, rows: Sequence[tuple[int, int]], masks: Sequence[Mask]
    ) -> torch.Tensor:
        """Process logits; returns the same tensor if no row has a logits processor.

        Args:
            logits_SV: float32; not changed.
            rows: (slot, output position of the token to sample), one per row.
            masks: one for each row that follows a grammar.
        """
        processed = [(row, *rows[row]) for row in range(len(rows)) if rows[row][0] in self._slots]
        if not processed and not masks:
            return logits_SV
        raw_SV, logits_SV = logits_SV, logits_SV.clone(memory_format=torch.contiguous_format)
        row_of = {slot: row for row, (slot, _) in enumerate(rows)} if masks else {}
        for mask in masks:
            _forbid(logits_SV[row_of[mask.slot]], mask)
        if processed:
            self._ban(logits_SV, processed)
            self._bias(logits_SV, processed)
            self._penalise(logits_SV, processed)
            for mask in masks:
                # If the others ban every token that the grammar allows, only the mask applies.
                logits_V = logits_SV[row_of[mask.slot]]
                if mask.slot in self._slots and logits_V.amax() == -torch.inf:
                    _forbid(logits_V.copy_(raw_SV[row_of[mask.slot]]), mask)
        return logits_SV

    def _ban(self, logits_SV: torch.Tensor, processed: Sequence[tuple[int, int, int]]) -> None:
        """Ban the last token of bad words whose other tokens end the output, and `ends` before min_tokens."""
        rows: list[int] = []
        ids: list[int] = []
        for row, slot, position in processed:
            state = self._slots[slot]
            sampling = state.sequence.sampling
            banned = list(state.always_banned)
            for word in sampling.bad_words:
                prefix_len = len(word) - 1  # a word of one token is in always_banned
                if prefix_len and tuple(state.output[-prefix_len:]) == word[:-1]:
                    banned.append(word[-1])
            if position < sampling.min_tokens:
                banned += state.sequence.ends
            rows += [row] * len(banned)
            ids += banned
        if rows:
            device = logits_SV.device
            logits_SV[torch.tensor(rows, device=device), torch.tensor(ids, device=device)] = -torch.inf

    def _bias(self, logits_SV: torch.Tensor, processed: Sequence[tuple[int, int, int]]) -> None:
        biased = [(row, self._slots[slot]) for row, slot, _ in processed]
        biased = [(row, state) for row, state in biased if len(state.bias_ids)]
        if not biased:
            return
        device = logits_SV.device
        rows = _repeat([row for row, _ in biased], [len(state.bias_ids) for _, state in biased]).to(device)
        ids = torch.cat([state.bias_ids for _, state in biased]).to(device)
        logits_SV[rows, ids] += torch.cat([state.bias_values for _, state in biased]).to(device)

    def _penalise(self, logits_SV: torch.Tensor, processed: Sequence[tuple[int, int, int]]) -> None:
        """Repetition as in Keskar et al. 2019; frequency and presence as in the OpenAI API reference."""
        penalised = [
            (row, token_counts, self._slots[slot].sequence.sampling)
            for row, slot, _ in processed
            if (token_counts := self._slots[slot].token_counts) is not None and token_counts.size
        ]
        if not penalised:
            return
        device = logits_SV.device
        sizes = [token_counts.size for _, token_counts, _ in penalised]

        def spread(values: list[float]) -> torch.Tensor:
            return _repeat(values, sizes).to(device)

        rows = _repeat([row for row, _, _ in penalised], sizes).to(device)
        ids = torch.cat([each.ids[: each.size] for _, each, _ in penalised]).to(device)
        counts = torch.cat([each.counts[: each.size] for _, each, _ in penalised]).to(device)
        repetition = spread([sampling.repetition_penalty for _, _, sampling in penalised])
        indices, flat = rows * logits_SV.shape[1] + ids, logits_SV.view(-1)
        logits = flat[indices]
        logits = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits -= spread([sampling.frequency_penalty for _, _, sampling in penalised]) * counts
        logits -= spread([sampling.presence_penalty for _, _, sampling in penalised]) * (counts > 0)
        flat.index_copy_(0, indices, logits)


def _begin(sequence: NewSequence) -> _SequenceState:
    s = sequence.sampling
    prompt = sequence.prompt_ids if s.repetition_penalty != 1 else ()
    return _SequenceState(
        sequence,
        list(sequence.output_ids),
        _TokenCounts.of(prompt, sequence.output_ids) if s.has_penalties else None,
        tuple(word[0] for word in s.bad_words if len(word) == 1),
        torch.tensor([token for token, _ in s.logit_bias], dtype=torch.int64),
        torch.tensor([bias for _, bias in s.logit_bias], dtype=torch.float32),
    )


def _forbid(logits_V: torch.Tensor, mask: Mask) -> None:
    """Set the tokens that a grammar does not allow to minus infinity."""
    data = torch.frombuffer(bytearray(mask.bits), dtype=torch.uint8)
    forbidden_V = _ZEROS_OF_BYTES[data.int()].view(-1)[: len(logits_V)]
    logits_V.masked_fill_(forbidden_V.to(logits_V.device), -torch.inf)


def _repeat(values: Sequence[float], counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values).repeat_interleave(torch.tensor(counts))
