"""Priority order: sequences are served in this order, and preempted in the reverse order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from engine.scheduling.sequence import Sequence

AGING_STEPS = 1024
"""One level of priority is worth this many steps of waiting."""

_ORDER = attrgetter("order")


def priority_order(priority: int, step: int, arrival: int) -> tuple[int, int]:
    """The place of a sequence in priority order; the smallest is served first. It never changes.

    Args:
        priority: of the request; lower is served earlier.
        step: the step at which the sequence arrives.
        arrival: number of the sequence, in the order of arrival.

    A sequence of priority p has the place of a sequence of priority 0 that arrives `p * AGING_STEPS` steps
    later. So only a limited number of later sequences overtake it, and no sequence starves.
    """
    return step + priority * AGING_STEPS, arrival


def outranks(waiting: Sequence, running: Sequence) -> bool:
    """Whether a waiting sequence may preempt a running one: both its priority and its place are better."""
    return waiting.request.priority < running.request.priority and waiting.order < running.order


class PriorityQueue:
    """Sequences in priority order."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __reversed__(self) -> Iterator[Sequence]:
        return reversed(self._sequences)

    @property
    def first(self) -> Sequence:
        """The sequence with the highest priority. The queue must not be empty."""
        return self._sequences[0]

    @property
    def last(self) -> Sequence:
        """The sequence with the lowest priority. The queue must not be empty."""
        return self._sequences[-1]

    def add(self, sequence: Sequence) -> None:
        """Insert a sequence at its place."""
        insort(self._sequences, sequence, key=_ORDER)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out.

        Raises:
            ValueError: the sequence is not in the queue.
        """
        index = bisect_left(self._sequences, sequence.order, key=_ORDER)
        if index == len(self._sequences) or self._sequences[index] is not sequence:
            raise ValueError("the sequence is not in this queue")
        del self._sequences[index]
