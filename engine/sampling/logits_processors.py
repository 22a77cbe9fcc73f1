"""Rules that change a row's logits before a token is drawn from them.

Shapes: S rows, V vocabulary.

In this order, as vLLM has it: the grammar's mask; bad words and, before `min_tokens`, the ends; logit bias;
repetition, then frequency and presence penalty. Temperature and truncation come after. All in float32 and
element by element, so that a row comes out the same in every batch.

Everything is a function of ids: the prompt's, the output's. So a sequence that is preempted or replayed
meets the rules as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from engine.plan import Mask, NewSequence, StepPlan

_ROOM = 16  # new tokens for which there is room at first
_ZEROS_OF_BYTES = (torch.arange(256)[:, None] >> torch.arange(8)) & 1 == 0


@dataclass(slots=True)
class _Seen:
    """The distinct tokens of a sequence and how often each is in its output. Grows by doubling."""

    ids: torch.Tensor
    counts: torch.Tensor
    size: int
    places: dict[int, int]

    @staticmethod
    def of(prompt: Iterable[int], output: Iterable[int]) -> _Seen:
        """All tokens of a prompt and an output."""
        counts = dict.fromkeys(prompt, 0)
        for token in output:
            counts[token] = counts.get(token, 0) + 1
        room = [0] * max(_ROOM, len(counts))
        return _Seen(
            torch.tensor([*counts, *room], dtype=torch.int64),
            torch.tensor([*counts.values(), *room], dtype=torch.float32),
            len(counts),
            {token: place for place, token in enumerate(counts)},
        )

    def add(self, token: int) -> None:
        """A token of the output."""
        place = self.places.get(token)
        if place is None:
            place = self.places[token] = self.size
            if place == len(self.ids):
                self.ids = torch.cat((self.ids, torch.zeros_like(self.ids)))
                self.counts = torch.cat((self.counts, torch.zeros_like(self.counts)))
            self.ids[place] = token
            self.size += 1
        self.counts[place] += 1


@dataclass(slots=True)
class _SlotState:
    """A sequence that has rules."""

    join: NewSequence
    output: list[int]
    seen: _Seen | None
    always_banned: tuple[int, ...]
    bias_ids: torch.Tensor
    bias_values: torch.Tensor


class Rules:
    """Owns: for slots that have rules, the tokens these depend on. Does not own: grammars.

    Slots without rules cost a look into a dictionary.
    """

    def __init__(self) -> None:
        self._slots: dict[int, _SlotState] = {}

    def follow(self, plan: StepPlan) -> None:
        """Take in who leaves and who joins."""
        for slot in plan.freed_slots:
            self._slots.pop(slot, None)
        for join in plan.new_sequences:
            if join.sampling.has_logits_processors:
                self._slots[join.slot] = _begin(join)

    def drawn(self, slot: int, token: int) -> None:
        """A token has been drawn for a slot."""
        state = self._slots.get(slot)
        if state is not None:
            state.output.append(token)
            if state.seen is not None:
                state.seen.add(token)

    def apply(
        self, logits_SV: torch.Tensor, rows: Sequence[tuple[int, int]], masks: Sequence[Mask]
    ) -> torch.Tensor:
        """The logits under all rules; the same tensor where there are none.

        Args:
            logits_SV: float32; left as it is.
            rows: (slot, output position of the token to draw), one per row.
            masks: of the rows that follow a grammar.
        """
        ruled = [(row, *rows[row]) for row in range(len(rows)) if rows[row][0] in self._slots]
        if not ruled and not masks:
            return logits_SV
        before_SV, logits_SV = logits_SV, logits_SV.clone(memory_format=torch.contiguous_format)
        row_of = {slot: row for row, (slot, _) in enumerate(rows)} if masks else {}
        for mask in masks:
            _forbid(logits_SV[row_of[mask.slot]], mask)
        if ruled:
            self._ban(logits_SV, ruled)
            self._bias(logits_SV, ruled)
            self._penalise(logits_SV, ruled)
            for mask in masks:
                # Whatever else bans all that the grammar allows gives way: the output must follow it.
                logits_V = logits_SV[row_of[mask.slot]]
                if mask.slot in self._slots and logits_V.amax() == -torch.inf:
                    _forbid(logits_V.copy_(before_SV[row_of[mask.slot]]), mask)
        return logits_SV

    def _ban(self, logits_SV: torch.Tensor, ruled: Sequence[tuple[int, int, int]]) -> None:
        """Bad words whose beginning is there, and ends that come too early."""
        rows: list[int] = []
        ids: list[int] = []
        for row, slot, position in ruled:
            state = self._slots[slot]
            sampling = state.join.sampling
            banned = list(state.always_banned)
            for word in sampling.bad_words:
                begin = len(word) - 1
                if begin and tuple(state.output[-begin:]) == word[:-1]:
                    banned.append(word[-1])
            if position < sampling.min_tokens:
                banned += state.join.ends
            rows += [row] * len(banned)
            ids += banned
        if rows:
            device = logits_SV.device
            logits_SV[torch.tensor(rows, device=device), torch.tensor(ids, device=device)] = -torch.inf

    def _bias(self, logits_SV: torch.Tensor, ruled: Sequence[tuple[int, int, int]]) -> None:
        biased = [(row, self._slots[slot]) for row, slot, _ in ruled]
        biased = [(row, state) for row, state in biased if len(state.bias_ids)]
        if not biased:
            return
        device = logits_SV.device
        rows = _repeat([row for row, _ in biased], [len(state.bias_ids) for _, state in biased]).to(device)
        ids = torch.cat([state.bias_ids for _, state in biased]).to(device)
        logits_SV[rows, ids] += torch.cat([state.bias_values for _, state in biased]).to(device)

    def _penalise(self, logits_SV: torch.Tensor, ruled: Sequence[tuple[int, int, int]]) -> None:
        """Keskar et al. 2019 for repetition; for frequency and presence the OpenAI API reference."""
        penalised = [
            (row, seen, self._slots[slot].join.sampling)
            for row, slot, _ in ruled
            if (seen := self._slots[slot].seen) is not None and seen.size
        ]
        if not penalised:
            return
        device = logits_SV.device
        sizes = [seen.size for _, seen, _ in penalised]

        def spread(values: list[float]) -> torch.Tensor:
            return _repeat(values, sizes).to(device)

        rows = _repeat([row for row, _, _ in penalised], sizes).to(device)
        ids = torch.cat([seen.ids[: seen.size] for _, seen, _ in penalised]).to(device)
        counts = torch.cat([seen.counts[: seen.size] for _, seen, _ in penalised]).to(device)
        repetition = spread([sampling.repetition_penalty for _, _, sampling in penalised])
        places, flat = rows * logits_SV.shape[1] + ids, logits_SV.view(-1)
        logits = flat[places]
        logits = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits -= spread([sampling.frequency_penalty for _, _, sampling in penalised]) * counts
        logits -= spread([sampling.presence_penalty for _, _, sampling in penalised]) * (counts > 0)
        flat.index_copy_(0, places, logits)


def _begin(join: NewSequence) -> _SlotState:
    s = join.sampling
    prompt = join.prompt_ids if s.repetition_penalty != 1 else ()
    return _SlotState(
        join,
        list(join.output_ids),
        _Seen.of(prompt, join.output_ids) if s.has_penalties else None,
        tuple(word[0] for word in s.bad_words if len(word) == 1),
        torch.tensor([token for token, _ in s.logit_bias], dtype=torch.int64),
        torch.tensor([bias for _, bias in s.logit_bias], dtype=torch.float32),
    )


def _forbid(logits_V: torch.Tensor, mask: Mask) -> None:
    """Set to minus infinity what a grammar does not allow."""
    data = torch.frombuffer(bytearray(mask.bits), dtype=torch.uint8)
    forbidden_V = _ZEROS_OF_BYTES[data.int()].view(-1)[: len(logits_V)]
    logits_V.masked_fill_(forbidden_V.to(logits_V.device), -torch.inf)


def _repeat(values: Sequence[float], counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values).repeat_interleave(torch.tensor(counts))
