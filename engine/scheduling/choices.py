"""The live choices of each request, and how they share the KV of their prompt.

Owns: the live sequences (from `submit` to their end), and which of them are held back.
Does not own: the queues of running and waiting sequences (`scheduler`), the blocks (`block_tables`).

The choices of a request have the same prompt. The first one to run computes it, and the others are held back
until then. Then they wait like all sequences. Each one starts from the KV of a sibling: it shares full
blocks, and gets a copy of the block in which it continues.
"""

from __future__ import annotations

from engine.scheduling.block_tables import BlockTables
from engine.scheduling.sequence import Sequence


class Choices:
    """All live sequences, by request."""

    def __init__(self, tables: BlockTables) -> None:
        self._tables = tables
        self.live: dict[str, list[Sequence]] = {}
        self.held_back: dict[str, list[Sequence]] = {}  # live ones that neither run nor wait
        self.num_live = 0

    def add(self, sequence: Sequence) -> None:
        """Add a new sequence."""
        self.live.setdefault(sequence.request.id, []).append(sequence)
        self.num_live += 1

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        for choices in (self.live, self.held_back):
            siblings = choices.get(sequence.request.id, [])
            if sequence in siblings:
                siblings.remove(sequence)
                if not siblings:
                    del choices[sequence.request.id]
        self.num_live -= 1

    def is_held_back(self, sequence: Sequence) -> bool:
        """Whether the sequence waits for a sibling to compute the prompt."""
        return sequence in self.held_back.get(sequence.request.id, ())

    def hold_back(self, sequence: Sequence) -> None:
        """Hold a sequence back until `release`."""
        self.held_back.setdefault(sequence.request.id, []).append(sequence)

    def release(self, request_id: str) -> list[Sequence]:
        """Stop holding back the choices of a request; returns them."""
        return self.held_back.pop(request_id, [])

    def sibling_with_prompt(self, sequence: Sequence) -> Sequence | None:
        """A running choice of the same request that can share the KV of the prompt."""
        if _takes_prompt_from_sibling(sequence):
            for sibling in self.live[sequence.request.id]:
                if sibling.slot is not None and self._tables.can_share_prompt(sibling, sequence):
                    return sibling
        return None

    def sibling_computes_prompt(self, sequence: Sequence) -> bool:
        """Whether a running choice of the same request has not yet computed the whole prompt."""
        return _takes_prompt_from_sibling(sequence) and any(
            sibling.slot is not None and sibling.num_computed_tokens < sibling.prompt_len
            for sibling in self.live[sequence.request.id]
        )


def _takes_prompt_from_sibling(sequence: Sequence) -> bool:
    """Whether a sequence may start from the KV of a sibling.

    It may not if it needs the log-probabilities of the prompt. With a prompt of one token there is nothing to
    share, because a sequence always computes its last token.
    """
    return sequence.request.n > 1 and sequence.prompt_len > 1 and not sequence.needs_prompt_logprobs
