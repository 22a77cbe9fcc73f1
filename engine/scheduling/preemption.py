"""Which running sequences are preempted so that another one can continue or start.

These functions only decide; `Scheduler` preempts the victims that they return.

Victims are always the sequences with the lowest priority, as few as possible. A sequence in flight is never a
victim: its results come first, and then the scheduler decides again. No sequence is preempted in vain: if all
possible victims together do not free enough, none is preempted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from engine.scheduling.block_tables import BlockTables
from engine.scheduling.prefix_match import PrefixMatch
from engine.scheduling.priority import PriorityQueue, outranks
from engine.scheduling.sequence import Sequence

Victims = list[Sequence]


def victims_to_continue(
    sequence: Sequence, num_missing_blocks: int, running: PriorityQueue, tables: BlockTables
) -> Victims | None:
    """The victims whose blocks a running sequence needs for its next chunk; None if it must wait."""

    def may_preempt(victim: Sequence) -> bool:
        return victim is not sequence and not victim.num_tokens_in_flight

    def is_enough(victims: Victims) -> bool:
        freed = tables.num_blocks_freed_by(victims) if victims else 0
        return num_missing_blocks <= tables.num_available_blocks + freed

    return _fewest_victims(running, may_preempt, is_enough)


def victims_to_start(
    sequence: Sequence, match: PrefixMatch, running: PriorityQueue, tables: BlockTables, num_free_slots: int
) -> Victims | None:
    """The victims whose place a waiting sequence takes; it outranks them all. None if it must wait."""

    def may_preempt(victim: Sequence) -> bool:
        return can_preempt(sequence, victim)

    def is_enough(victims: Victims) -> bool:
        return has_room_to_start(sequence, match, running, tables, num_free_slots, victims)

    return _fewest_victims(running, may_preempt, is_enough)


def can_preempt(waiting: Sequence, victim: Sequence) -> bool:
    """Whether a waiting sequence may take the slot and the blocks of a running one."""
    return outranks(waiting, victim) and not victim.num_tokens_in_flight


def has_room_to_start(
    sequence: Sequence,
    match: PrefixMatch,
    running: Iterable[Sequence],
    tables: BlockTables,
    num_free_slots: int,
    victims: Victims | tuple[()] = (),
) -> bool:
    """Whether a waiting sequence can get a slot and all its blocks once `victims` are preempted.

    Blocks that other running sequences still need for their known tokens are reserved for them. Without this
    rule, a sequence could be preempted right after its start.
    """
    if not num_free_slots and not victims:
        return False
    needed = tables.num_blocks_to_start(sequence, match)
    reserved = sum(map(tables.num_missing_blocks, running)) - sum(map(tables.num_missing_blocks, victims))
    freed = tables.num_blocks_freed_by(victims, excluding=match.blocks)
    return needed + reserved <= tables.num_available_blocks + freed


def _fewest_victims(
    running: PriorityQueue,
    may_preempt: Callable[[Sequence], bool],
    is_enough: Callable[[Victims], bool],
) -> Victims | None:
    """The shortest list of sequences from the end of `running` that is enough; None if no list is."""
    victims: Victims = []
    candidates = reversed(running)
    while not is_enough(victims):
        candidate = next(candidates, None)
        if candidate is None or not may_preempt(candidate):
            return None
        victims.append(candidate)
    return victims
