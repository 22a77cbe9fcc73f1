"""The gateway's decisions: events in, instructions out. No sockets, no clocks, no awaiting.

Owns: every live request's journal, the requests that wait for a replica, and which attempt runs where.
Does not own: streams (`replicas`), clients (`server`, `http`), spans and metrics (`gateway`).

A live request either waits for a replica or has one attempt on a replica.

Stale output is dropped here. `frame` drops a whole frame unless its epoch is that of the open stream, and
`_current` drops each part that is not of the request's current attempt. No epoch is used twice, and no two
attempts of a gateway have the same number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from dataplane.gateway.instructions import (
    AttemptEnded,
    CancelAttempt,
    CloseSilent,
    Distrust,
    Found,
    Instruction,
    Submit,
    Wake,
)
from dataplane.gateway.journal import Journal
from dataplane.gateway.router import Router, Target
from dataplane.gateway.search import Searches
from dataplane.gateway.silence import SILENCE_TIMEOUT_S, SilenceDetector
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.runtime.rpc import from_message

MAX_EARLY_LOSSES = 4
"""So many attempts in a row lost early (`journal.EARLY_TOKENS`) end a request: it may kill replicas."""
PLACEMENT_TIMEOUT_S = 120.0
"""How long a request waits for a replica before it ends with NO_REPLICA."""
_ENDED_BY_CLIENT = ("CANCELLED", "TAKEN_OVER")  # the client wanted this end: not a failure


@dataclass(slots=True)
class _Placement:
    """A live request and the replica that runs it; no `target` means that it waits for one."""

    journal: Journal
    deadline: float | None
    target: Target | None = None
    waiting_since: float = 0.0
    failover_reason: str = ""


@dataclass(slots=True)
class Counters:
    """Totals since the gateway started, exported as metrics."""

    accepted: int = 0
    finished: int = 0
    failed: int = 0
    lost: int = 0
    cancelled: int = 0
    resumed: int = 0
    failovers: int = 0
    replayed_tokens: int = 0
    duplicate_tokens_dropped: int = 0
    stale_frames_dropped: int = 0


@dataclass(slots=True)
class Dispatcher:
    """All live requests of one gateway."""

    router: Router = field(default_factory=Router)
    counters: Counters = field(default_factory=Counters)
    _placements: dict[str, _Placement] = field(default_factory=dict)  # by request id
    _attempt_numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _silence: SilenceDetector = field(default_factory=SilenceDetector)
    _searches: Searches = field(init=False)

    def __post_init__(self) -> None:
        self._searches = Searches(self._attempt_numbers)

    @property
    def live(self) -> int:
        """The number of requests that have not ended."""
        return len(self._placements)

    def deadline(self, request_id: str) -> float | None:
        """When a live request must end; None if it has no deadline or is not live."""
        return self._placements[request_id].deadline if request_id in self._placements else None

    # Clients

    def open(self, journal: Journal, now: float, timeout_s: float | None = None) -> list[Instruction]:
        """Take a new request. Raises PhalanxError DUPLICATE_REQUEST when its id is live."""
        if journal.request_id in self._placements:
            raise PhalanxError("DUPLICATE_REQUEST", f"request {journal.request_id!r} is live already")
        deadline = None if timeout_s is None else now + timeout_s
        live = self._placements[journal.request_id] = _Placement(journal, deadline, waiting_since=now)
        return self._place(live, now)

    def adopt(self, journal: Journal, now: float, timeout_s: float | None = None) -> list[Instruction]:
        """Take a request that another gateway began and no replica holds. Raises as `open` does."""
        todo = self.open(journal, now, timeout_s)
        self.counters.resumed += 1
        return todo

    def seek(self, model: str, resume_key: str, now: float) -> list[Instruction]:
        """Ask a deployment's replicas for a request that another gateway began.

        The search ends in exactly one `Found` or `NotHeld`.
        """
        routes = self.router.routes.values()
        asked = [route.target for route in routes if route.target.deployment == model]
        return self._searches.begin(resume_key, asked, now)

    def cancel(self, request_id: str) -> tuple[bool, list[Instruction]]:
        """End a request early, because its client wants that. Returns whether the request was live."""
        live = self._placements.get(request_id)
        if live is None:
            return False, []
        self.counters.cancelled += 1
        return True, self._close(live, PhalanxError("CANCELLED", "the request was cancelled"))

    # Replicas

    def stream_up(self, target: Target, leader: shard_pb2.LeaderHello, now: float) -> list[Instruction]:
        """A replica's leader has answered: the replica takes attempts from now on."""
        self.router.add(target, leader)
        self._silence.heard(target, now)
        return self._place_waiting(now)

    def stream_down(
        self, target: Target, reason: str, now: float, *, blame: bool = True
    ) -> list[Instruction]:
        """A replica's stream has ended. Its attempts are lost; their requests are replayed.

        `blame`: a request on the replica may be the cause; False when the topology closed the stream.
        """
        self.router.remove(target)
        self._silence.forget(target)
        out: list[Instruction] = []
        for live in [live for live in self._placements.values() if live.target == target]:
            out += self._lose(live, reason, now, blame=blame)
        out += self._searches.stream_down(target)
        return out + self._place_waiting(now)

    def frame(self, target: Target, frame: shard_pb2.StepFrame, now: float) -> list[Instruction]:
        """One step of a replica, from the stream to `target`. A frame of another epoch is dropped whole."""
        route = self.router.routes.get(target.replica)
        if (
            route is None
            or route.target != target
            or frame.epoch != target.epoch
            or frame.replica != target.replica
        ):
            self.counters.stale_frames_dropped += 1
            return []
        self._silence.heard(target, now)
        route.report(frame.load)
        out: list[Instruction] = []
        for attached in frame.attached:
            out += self._attached(target, attached, now)
        for accepted in frame.accepted:
            if live := self._current(target, accepted.request_id, accepted.attempt):
                if not live.journal.accepted:
                    self.counters.accepted += 1
                live.journal.accept(accepted.prompt_ids)
                out.append(Wake(live.journal))
        for delta in frame.deltas:
            if live := self._current(target, delta.request_id, delta.attempt):
                out += self._append(live, target, delta)
        for failed in frame.failed:
            if not failed.request_id:  # the answer to an Attach
                out += self._searches.answered_no(failed.attempt)
            elif live := self._current(target, failed.request_id, failed.attempt):
                error = from_message(failed.error)
                out += self._lose(live, error.reason, now, error=error)
        return out + self._place_waiting(now) if frame.failed else out

    # Time

    def tick(self, now: float) -> list[Instruction]:
        """End everything that has timed out: silent streams, searches, requests late or without a replica."""
        self._searches.extend(self._silence.own_pause(now))
        out: list[Instruction] = [
            CloseSilent(target, f"silent for {SILENCE_TIMEOUT_S} s")
            for target in self._silence.timed_out(now)
        ]
        out += self._searches.tick(now)
        for live in list(self._placements.values()):
            if live.deadline is not None and now >= live.deadline:
                error = PhalanxError("DEADLINE_EXCEEDED", "the request's deadline has passed")
                out += self._close(live, error)
            elif live.target is None and now >= live.waiting_since + PLACEMENT_TIMEOUT_S:
                message = f"no replica of {live.journal.model!r} was ready within {PLACEMENT_TIMEOUT_S:.0f} s"
                out += self._close(live, PhalanxError("NO_REPLICA", message))
        return out

    # Decisions

    def _attached(self, target: Target, attached: shard_pb2.Attached, now: float) -> list[Instruction]:
        """A replica holds a request that was asked for, and has attached it to this gateway's stream."""
        request, number = attached.request, attached.attempt
        key = request.resume_key
        live = self._placements.get(request.request_id)
        if live is not None and live.target == target and live.journal.is_current(number):
            return []  # the same answer again
        if live is not None and live.journal.resume_key == key:
            # Another replica answered first.
            cancel = shard_pb2.CancelAttempt(request_id=request.request_id, attempt=number)
            return [CancelAttempt(target, cancel), *self._searches.answered_no(number)]
        if live is not None or not self._searches.claim(key, number, target):
            # The search has timed out. Leave the attempt for the client's retry: it may be the only copy.
            return self._searches.answered_no(number)
        leader = self.router.routes[target.replica].leader
        journal = Journal.restore(target.deployment, request, leader.eos_token_ids)
        self.counters.resumed += 1
        if not journal.finished:
            journal.adopt(number, target.replica, leader)
            deadline = now + request.deadline_ms / 1000 if request.deadline_ms else None
            self._placements[journal.request_id] = _Placement(journal, deadline, target, waiting_since=now)
            self.router.sent(target.replica, len(journal.choices))
        return [Found(target, journal)]

    def _current(self, target: Target, request_id: str, attempt: int) -> _Placement | None:
        """The request, if this attempt on this replica is its current one; else the part is stale."""
        live = self._placements.get(request_id)
        if live is not None and live.target == target and live.journal.is_current(attempt):
            return live
        self.counters.stale_frames_dropped += 1
        return None

    def _append(self, live: _Placement, target: Target, delta: shard_pb2.Delta) -> list[Instruction]:
        journal, before = live.journal, live.journal.duplicates
        if not journal.append(delta):
            return [Distrust(target, f"a delta of request {journal.request_id} does not follow its journal")]
        self.counters.duplicate_tokens_dropped += journal.duplicates - before
        if not journal.finished:
            return [Wake(journal)]
        return self._close(live, None)

    def _place_waiting(self, now: float) -> list[Instruction]:
        return [
            instruction
            for live in sorted(
                (live for live in self._placements.values() if live.target is None),
                # Earliest deadline first: a replica serves requests in the order of arrival.
                key=lambda live: (math.inf if live.deadline is None else live.deadline, live.waiting_since),
            )
            for instruction in self._place(live, now)
        ]

    def _place(self, live: _Placement, now: float) -> list[Instruction]:
        """Begin an attempt of a waiting request, if a replica can take it."""
        journal = live.journal
        route = self.router.pick(journal.model, journal.model_hash, journal.length)
        if route is None:
            return []
        live.target = route.target
        message = journal.begin(next(self._attempt_numbers), route.target.replica, route.leader)
        if live.deadline is not None:
            message.deadline_ms = max(1, int((live.deadline - now) * 1000))
        self.router.sent(route.target.replica, len(journal.choices))
        if journal.attempts > 1:
            self.counters.failovers += 1
            self.counters.replayed_tokens += journal.tokens
        return [Submit(route.target, journal, message, live.failover_reason)]

    def _lose(
        self,
        live: _Placement,
        reason: str,
        now: float,
        *,
        error: PhalanxError | None = None,
        blame: bool = True,
    ) -> list[Instruction]:
        """An attempt is lost with its stream, or its replica refused it with `error`: requeue the request."""
        journal = live.journal
        ended = self._end_attempt(live, reason)
        # Never replay DEADLINE_EXCEEDED: the deadline has passed for every other attempt, too.
        if error is not None and (not error.retryable or error.reason == "DEADLINE_EXCEEDED"):
            return ended + self._close(live, error)
        journal.lose(blame=blame)
        if journal.finished:
            return ended + self._close(live, None)
        if journal.early_losses >= MAX_EARLY_LOSSES:
            message = f"{journal.early_losses} attempts in a row were lost as they began; the last: {reason}"
            return ended + self._close(live, PhalanxError("ATTEMPTS_EXHAUSTED", message))
        live.waiting_since, live.failover_reason = now, reason
        return ended

    def _end_attempt(self, live: _Placement, error: str) -> list[Instruction]:
        """Take the request off its replica."""
        assert live.target is not None
        self.router.ended(live.target.replica, live.target.epoch, len(live.journal.choices))
        live.target = None
        return [AttemptEnded(live.journal, error)]

    def _close(self, live: _Placement, error: PhalanxError | None) -> list[Instruction]:
        """End the request, with `error` or finished. An attempt that still runs is cancelled."""
        journal = live.journal
        out: list[Instruction] = []
        if live.target is not None:
            if journal.attempt is not None:
                cancel = shard_pb2.CancelAttempt(
                    request_id=journal.request_id, attempt=journal.attempt.number
                )
                out.append(CancelAttempt(live.target, cancel))
            out += self._end_attempt(live, "" if error is None else error.reason)
        if error is None:
            self.counters.finished += 1
        else:
            journal.fail(error)
            self.counters.failed += error.reason not in _ENDED_BY_CLIENT
            no_loss = (*_ENDED_BY_CLIENT, "DEADLINE_EXCEEDED")
            self.counters.lost += journal.accepted and error.reason not in no_loss
        del self._placements[journal.request_id]
        return [*out, Wake(journal)]

    def check_integrity(self) -> None:
        """Assert the invariants that hold between any two events."""
        sent = _count(
            (live.target.replica, len(live.journal.choices))
            for live in self._placements.values()
            if live.target
        )
        for replica, route in self.router.routes.items():
            assert route.sent == sent.get(replica, 0), (
                f"{replica}: {route.sent} sent, {sent.get(replica, 0)} live"
            )
        for live in self._placements.values():
            assert not live.journal.closed
            assert (live.target is None) == (live.journal.attempt is None)


def _count(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for name, number in pairs:
        total[name] = total.get(name, 0) + number
    return total
