"""The search for a resumed request among a deployment's replicas. Pure: time is an argument.

A client resumes a request at a gateway that does not have it. The gateway asks every replica of the
deployment to attach the request to its stream. The first replica that holds the request ends the search.

Owns: which replicas have been asked and have not answered yet.
Does not own: the answer that a replica holds the request (`dispatcher`), clients that wait (`resumption`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dataplane.gateway.instructions import Attach, Instruction, NotHeld
from dataplane.gateway.router import Target
from phalanx.internal.v1 import shard_pb2

SEARCH_TIMEOUT_S = 1.0
"""How long replicas have to answer."""


@dataclass(slots=True)
class _Search:
    resume_key: str
    until: float
    asked: dict[int, Target]  # replicas that have not answered, by the attempt number they were offered
    certain: bool = True  # every replica that is no longer in `asked` has answered no


class Searches:
    """All searches of one gateway. Each ends in exactly one `Found` or `NotHeld`."""

    def __init__(self, attempt_numbers: Iterator[int]) -> None:
        self._attempt_numbers = attempt_numbers
        self._by_key: dict[str, _Search] = {}

    def begin(self, resume_key: str, targets: Iterable[Target], now: float) -> list[Instruction]:
        """Ask these replicas. A key that is being searched for already is not asked for again."""
        if resume_key in self._by_key:
            return []
        asked = {next(self._attempt_numbers): target for target in targets}
        search = self._by_key[resume_key] = _Search(resume_key, now + SEARCH_TIMEOUT_S, asked)
        if not asked:
            return self._give_up(search, certain=False)
        return [
            Attach(target, shard_pb2.Attach(resume_key=resume_key, attempt=number))
            for number, target in asked.items()
        ]

    def claim(self, resume_key: str, number: int, target: Target) -> bool:
        """End the search: a replica holds the request. False if it was not asked, or is too late."""
        search = self._by_key.get(resume_key)
        if search is None or search.asked.get(number) != target:
            return False
        del self._by_key[resume_key]
        return True

    def answered_no(self, number: int) -> list[Instruction]:
        """The replica that was offered this attempt number does not hold the request."""
        for search in self._by_key.values():
            if search.asked.pop(number, None) is not None and not search.asked:
                return self._give_up(search, certain=search.certain)
        return []

    def stream_down(self, target: Target) -> list[Instruction]:
        """A replica can no longer answer: "not held" is not certain any more."""
        out: list[Instruction] = []
        for search in list(self._by_key.values()):
            for number in [number for number, asked in search.asked.items() if asked == target]:
                search.certain = False
                out += self.answered_no(number)
        return out

    def extend(self, seconds: float) -> None:
        """This gateway itself was paused: give replicas that much longer."""
        for search in self._by_key.values():
            search.until += seconds

    def tick(self, now: float) -> list[Instruction]:
        """End the searches that have timed out."""
        late = [search for search in self._by_key.values() if now >= search.until]
        return [todo for search in late for todo in self._give_up(search, certain=False)]

    def _give_up(self, search: _Search, *, certain: bool) -> list[Instruction]:
        del self._by_key[search.resume_key]
        return [NotHeld(search.resume_key, certain)]
