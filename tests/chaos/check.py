"""What must hold for every answer, whatever happened. Only compares answers; knows no cluster. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tests.chaos.load import Answer


@dataclass(slots=True)
class Verdict:
    """The number of correct answers, and what was wrong with the others."""

    whole: int = 0
    lost: list[str] = field(default_factory=list)  # ended with an error, or without an end
    wrong: list[str] = field(default_factory=list)  # repeated, skipped or changed a token

    @property
    def ok(self) -> bool:
        """Whether every answer was whole and right."""
        return not self.lost and not self.wrong


def check(answers: Iterable[Answer], references: Sequence[Answer]) -> Verdict:
    """Compare every answer with the undisturbed answer to the same request."""
    verdict = Verdict()
    for answer in answers:
        name = f"request {answer.number}, {len(answer.ids)} tokens"
        if answer.problem:
            (verdict.wrong if answer.problem.startswith("position") else verdict.lost).append(
                f"{name}: {answer.problem}"
            )
        elif answer.ended is None:
            verdict.lost.append(f"{name}: no end")
        elif not answer.same_as(references[answer.number]):
            at = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(answer.ids, references[answer.number].ids, strict=False))
                    if a != b
                ),
                min(len(answer.ids), len(references[answer.number].ids)),
            )
            verdict.wrong.append(f"{name}: differs from the undisturbed answer at {at}")
        else:
            verdict.whole += 1
    return verdict


def longest_gap(answer: Answer, since: float) -> float:
    """The longest time between two consecutive events of a client, in seconds.

    Only gaps that end after `since` count. The wait for the first event is a gap, too.
    """
    times = [answer.began, *answer.arrivals]
    gaps = [later - earlier for earlier, later in pairwise(times) if later > since]
    return max(gaps, default=0.0)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value such that at least `share` of all values do not exceed it."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]
