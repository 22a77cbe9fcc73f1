"""A picture of a run: when each client received tokens, and when each fault was injected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.chaos.load import Answer

if TYPE_CHECKING:
    from tests.chaos.__main__ import Repetition

_WIDTH, _LANE, _LEFT, _TOP = 1400, 14, 60, 90
_GAP_S = 0.1  # shown as a break in a client's line


def draw(done: Sequence[Repetition], answers: Sequence[Answer], path: Path) -> None:
    """Write an SVG: a lane per concurrent stream, a red line per fault, a green one when it served again."""
    if not done or not answers:
        return
    start = min(answer.began for answer in answers)
    end = max(answer.arrivals[-1] for answer in answers if answer.arrivals)
    scale = (_WIDTH - _LEFT - 20) / (end - start)
    lanes = _lanes(answers)
    height = _TOP + _LANE * (max(lanes) + 1) + 30

    def x(when: float) -> float:
        return round(_LEFT + (when - start) * scale, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    for answer, lane in zip(answers, lanes, strict=True):
        y = _TOP + lane * _LANE
        for begin, stop in _bursts(answer):
            parts.append(
                f'<rect x="{x(begin)}" y="{y}" width="{max(0.6, round((stop - begin) * scale, 1))}" '
                f'height="{_LANE - 4}" fill="{"#c23b22" if answer.problem else "#2b5d8a"}"/>'
            )
    for number, one in enumerate(done):
        at = x(one.at)
        parts.append(f'<line x1="{at}" x2="{at}" y1="{_TOP - 8}" y2="{height - 24}" stroke="#c23b22"/>')
        parts.append(f'<text x="{at}" y="{_TOP - 12 - 12 * (number % 6)}" fill="#c23b22">{one.what}</text>')
        if one.reformed_s is not None:
            again = x(one.at + one.reformed_s)
            parts.append(
                f'<line x1="{again}" x2="{again}" y1="{_TOP - 8}" y2="{height - 24}" stroke="#7a9e4b"/>'
            )
    for second in range(0, int(end - start) + 1, max(1, int((end - start) / 20))):
        parts.append(f'<text x="{x(start + second)}" y="{height - 8}">{second} s</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def _lanes(answers: Sequence[Answer]) -> list[int]:
    """A lane for each answer. Answers in one lane do not overlap in time."""
    free: list[float] = []
    lanes = [0] * len(answers)
    for index in sorted(range(len(answers)), key=lambda index: answers[index].began):
        answer = answers[index]
        lane = next((lane for lane, until in enumerate(free) if until <= answer.began), len(free))
        if lane == len(free):
            free.append(0.0)
        free[lane] = answer.arrivals[-1] if answer.arrivals else answer.began
        lanes[index] = lane
    return lanes


def _bursts(answer: Answer) -> list[tuple[float, float]]:
    """The intervals in which events arrived without a gap."""
    bursts: list[tuple[float, float]] = []
    for when in answer.arrivals:
        if bursts and when - bursts[-1][1] < _GAP_S:
            bursts[-1] = (bursts[-1][0], when)
        else:
            bursts.append((when, when))
    return bursts
