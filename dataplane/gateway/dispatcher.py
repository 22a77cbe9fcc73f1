"""The gateway's decisions: events in, instructions out. No sockets, no clocks, no awaiting.

Owns: every live request's journal, who waits for a replica, and which attempt runs where.
Does not own: streams (`replica_stream`), clients (`server`, `http`), spans and metrics (`gateway`).

A request is always in exactly one place: waiting for a replica, on a replica, or closed. One that a client
resumes is sought first: this gateway asks the deployment's replicas whether one of them holds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from dataplane.gateway.journal import Journal
from dataplane.gateway.router import Router, Target
from phalanx.internal.v1 import shard_pb2
from phalanx.runtime.errors import PhalanxError
from phalanx.runtime.rpc import from_message

MAX_FRUITLESS_ATTEMPTS = 4
PATIENCE_S = 120.0
"""How long a request waits for a replica before it is told that there is none."""
SILENCE_S = 1.5
"""A leader sends a frame every `dataplane.shard.leader.BEAT_S`, whatever its engine does."""
SEEK_S = 1.0
"""How long replicas have to say whether they hold a request that is sought."""
_OF_CLIENTS = ("CANCELLED", "TAKEN_OVER")  # ends that clients wanted
PAUSE_S = 0.5
"""No tick for so long: this gateway itself stood still, and has not read what has come."""


@dataclass(frozen=True, slots=True)
class Submit:
    """Send an attempt to a replica."""

    target: Target
    journal: Journal
    message: shard_pb2.Submit
    after: str  # why the attempt before it ended; empty for the first


@dataclass(frozen=True, slots=True)
class CancelAttempt:
    """Tell a replica to forget an attempt."""

    target: Target
    message: shard_pb2.CancelAttempt


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt is over: with `error`, or well when that is empty."""

    journal: Journal
    error: str


@dataclass(frozen=True, slots=True)
class Wake:
    """The journal has news for its client."""

    journal: Journal


@dataclass(frozen=True, slots=True)
class Distrust:
    """A replica broke the protocol: close its stream."""

    target: Target
    reason: str


@dataclass(frozen=True, slots=True)
class HangUp:
    """A replica has fallen silent: close its stream. Its process may stand still, or its host be cut off."""

    target: Target
    reason: str


@dataclass(frozen=True, slots=True)
class Attach:
    """Ask a replica for a request that another gateway had begun."""

    target: Target
    message: shard_pb2.Attach


@dataclass(frozen=True, slots=True)
class Found:
    """A request that was sought runs on a replica, and here from now on. `target` has it."""

    target: Target
    journal: Journal


@dataclass(frozen=True, slots=True)
class NotHeld:
    """No replica holds the request of this resume key; `certain` if all of them have said so."""

    resume_key: str
    certain: bool = True


Instruction = Submit | CancelAttempt | AttemptEnded | Wake | Distrust | HangUp | Attach | Found | NotHeld


@dataclass(slots=True)
class _Live:
    journal: Journal
    deadline: float | None
    target: Target | None = None
    waiting_since: float = 0.0
    after: str = ""


@dataclass(slots=True)
class _Search:
    resume_key: str
    until: float
    asked: dict[int, Target]  # by the attempt's number to be
    certain: bool = True  # all that no longer are asked have said no


@dataclass(slots=True)
class Counters:
    """What has happened since the start; exported as metrics."""

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
    _live: dict[str, _Live] = field(default_factory=dict)
    _searches: dict[str, _Search] = field(default_factory=dict)  # by resume key
    _attempts: int = 0  # begun by this gateway, over all requests
    _heard: dict[Target, float] = field(default_factory=dict)  # when each open stream's last frame came
    _ticked: float = 0.0

    @property
    def live(self) -> int:
        """Requests that are not closed."""
        return len(self._live)

    def deadline(self, request_id: str) -> float | None:
        """When a live request's time is up, if ever."""
        return self._live[request_id].deadline if request_id in self._live else None

    # Clients

    def open(self, journal: Journal, now: float, timeout_s: float | None = None) -> list[Instruction]:
        """Take a new request. Raises PhalanxError DUPLICATE_REQUEST when its id is live."""
        if journal.request_id in self._live:
            raise PhalanxError("DUPLICATE_REQUEST", f"request {journal.request_id!r} is live already")
        deadline = None if timeout_s is None else now + timeout_s
        live = self._live[journal.request_id] = _Live(journal, deadline, waiting_since=now)
        return self._place(live, now)

    def adopt(self, journal: Journal, now: float, timeout_s: float | None = None) -> list[Instruction]:
        """Take a request that was begun elsewhere and that no replica holds. Raises as `open` does."""
        todo = self.open(journal, now, timeout_s)
        self.counters.resumed += 1
        return todo

    def seek(self, model: str, resume_key: str, now: float) -> list[Instruction]:
        """Ask for a request that was begun elsewhere. Ends in one Found or one NotHeld."""
        if resume_key in self._searches:
            return []
        search = self._searches[resume_key] = _Search(resume_key, now + SEEK_S, {})
        out: list[Instruction] = []
        for route in self.router.routes.values():
            if route.target.deployment == model:
                self._attempts += 1
                search.asked[self._attempts] = route.target
                attach = shard_pb2.Attach(resume_key=resume_key, attempt=self._attempts)
                out.append(Attach(route.target, attach))
        return out or self._give_up(search, certain=False)

    def cancel(self, request_id: str) -> tuple[bool, list[Instruction]]:
        """End a request early, for its client's sake. Returns whether it was live."""
        live = self._live.get(request_id)
        if live is None:
            return False, []
        self.counters.cancelled += 1
        return True, self._close(live, PhalanxError("CANCELLED", "the request was cancelled"))

    # Replicas

    def stream_up(self, target: Target, leader: shard_pb2.LeaderHello, now: float) -> list[Instruction]:
        """A replica's leader has answered: it takes attempts from now on."""
        self.router.add(target, leader)
        self._heard[target] = now
        return self._place_waiting(now)

    def stream_down(
        self, target: Target, reason: str, now: float, *, blame: bool = True
    ) -> list[Instruction]:
        """A replica's stream has broken or was closed: its attempts are lost, their requests are not.

        `blame`: a request on it may have been the cause; false when the topology wanted the end.
        """
        self.router.remove(target)
        self._heard.pop(target, None)
        lost = [live for live in self._live.values() if live.target == target]
        out: list[Instruction] = []
        for live in lost:
            out += self._lose(live, reason, now, blame=blame)
        for search in list(self._searches.values()):
            for number in [number for number, asked in search.asked.items() if asked == target]:
                search.certain = False
                out += self._not_there(number)
        return out + self._place_waiting(now)

    def frame(self, target: Target, frame: shard_pb2.StepFrame, now: float) -> list[Instruction]:
        """One step of a replica. Frames of another epoch than the stream's are dropped whole."""
        route = self.router.routes.get(target.replica)
        if (
            route is None
            or route.target != target
            or frame.epoch != target.epoch
            or frame.replica != target.replica
        ):
            self.counters.stale_frames_dropped += 1
            return []
        self._heard[target] = now
        self.router.report(target.replica, frame.load)
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
            if not failed.request_id:
                out += self._not_there(failed.attempt)
            elif live := self._current(target, failed.request_id, failed.attempt):
                error = from_message(failed.error)
                out += self._lose(live, error.reason, now, error=error)
        return out + self._place_waiting(now) if frame.failed else out

    # Time

    def tick(self, now: float) -> list[Instruction]:
        """End the requests whose time is up, and the streams that have fallen silent."""
        out: list[Instruction] = self._hang_up(now)
        for search in [search for search in self._searches.values() if now >= search.until]:
            out += self._give_up(search, certain=False)
        for live in list(self._live.values()):
            if live.deadline is not None and now >= live.deadline:
                out += self._close(
                    live, PhalanxError("DEADLINE_EXCEEDED", "the request's deadline has passed")
                )
            elif live.target is None and now >= live.waiting_since + PATIENCE_S:
                message = f"no replica of {live.journal.model!r} was ready within {PATIENCE_S:.0f} s"
                out += self._close(live, PhalanxError("NO_REPLICA", message))
        return out

    # Decisions

    def _hang_up(self, now: float) -> list[Instruction]:
        stood_still, self._ticked = now - self._ticked, now
        if stood_still > PAUSE_S:
            self._heard = {target: heard + stood_still for target, heard in self._heard.items()}
            for search in self._searches.values():
                search.until += stood_still
        silent = [target for target, heard in self._heard.items() if now - heard > SILENCE_S]
        for target in silent:
            del self._heard[target]  # once is enough
        return [HangUp(target, f"silent for {SILENCE_S} s") for target in silent]

    def _attached(self, target: Target, attached: shard_pb2.Attached, now: float) -> list[Instruction]:
        """A replica holds what was sought, and this gateway has it from now on."""
        request, number = attached.request, attached.attempt
        key = request.resume_key
        search, route = self._searches.get(key), self.router.routes[target.replica]
        live = self._live.get(request.request_id)
        if live is not None and live.journal.resume_key == key:
            # Another replica was faster.
            cancel = shard_pb2.CancelAttempt(request_id=request.request_id, attempt=number)
            return [CancelAttempt(target, cancel), *self._not_there(number)]
        if search is None or search.asked.get(number) != target or live is not None:
            return self._not_there(number)  # too late for its client, who asks again; it may be the only copy
        del self._searches[key]
        journal = Journal.restore(target.deployment, request, route.leader.eos_token_ids)
        self.counters.resumed += 1
        if not journal.finished:
            journal.adopt(number, target.replica, route.leader)
            deadline = now + request.deadline_ms / 1000 if request.deadline_ms else None
            self._live[journal.request_id] = _Live(journal, deadline, target, waiting_since=now)
            self.router.sent(target.replica, len(journal.choices))
        return [Found(target, journal)]

    def _not_there(self, number: int) -> list[Instruction]:
        """A replica that was asked does not hold what is sought."""
        for search in self._searches.values():
            if search.asked.pop(number, None) is not None and not search.asked:
                return self._give_up(search, certain=search.certain)
        return []

    def _give_up(self, search: _Search, *, certain: bool) -> list[Instruction]:
        del self._searches[search.resume_key]
        return [NotHeld(search.resume_key, certain)]

    def _current(self, target: Target, request_id: str, attempt: int) -> _Live | None:
        live = self._live.get(request_id)
        if live is not None and live.target == target and live.journal.is_current(attempt):
            return live
        self.counters.stale_frames_dropped += 1
        return None

    def _append(self, live: _Live, target: Target, delta: shard_pb2.Delta) -> list[Instruction]:
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
                (live for live in self._live.values() if live.target is None),
                # Whose time is up first comes first: replicas serve in the order of arrival.
                key=lambda live: (math.inf if live.deadline is None else live.deadline, live.waiting_since),
            )
            for instruction in self._place(live, now)
        ]

    def _place(self, live: _Live, now: float) -> list[Instruction]:
        journal = live.journal
        route = self.router.pick(journal.model, journal.model_hash, journal.length)
        if route is None:
            return []
        live.target = route.target
        self._attempts += 1
        message = journal.begin(self._attempts, route.target.replica, route.leader)
        if live.deadline is not None:
            message.deadline_ms = max(1, int((live.deadline - now) * 1000))
        self.router.sent(route.target.replica, len(journal.choices))
        if journal.attempts > 1:
            self.counters.failovers += 1
            self.counters.replayed_tokens += journal.tokens
        return [Submit(route.target, journal, message, live.after)]

    def _lose(
        self,
        live: _Live,
        reason: str,
        now: float,
        *,
        error: PhalanxError | None = None,
        blame: bool = True,
    ) -> list[Instruction]:
        """An attempt has died, or its replica refused it with `error`."""
        journal = live.journal
        ended = self._leave(live, reason)
        # A deadline may be worth a new request, never a new attempt.
        if error is not None and (not error.retryable or error.reason == "DEADLINE_EXCEEDED"):
            return ended + self._close(live, error)
        journal.lose(blame=blame)
        if journal.finished:
            return ended + self._close(live, None)
        if journal.fruitless >= MAX_FRUITLESS_ATTEMPTS:
            message = f"{journal.fruitless} attempts in a row were lost as they began; the last: {reason}"
            return ended + self._close(live, PhalanxError("ATTEMPTS_EXHAUSTED", message))
        live.waiting_since, live.after = now, reason
        return ended

    def _leave(self, live: _Live, error: str) -> list[Instruction]:
        """Take the request off its replica."""
        assert live.target is not None
        self.router.ended(live.target.replica, live.target.epoch, len(live.journal.choices))
        live.target = None
        return [AttemptEnded(live.journal, error)]

    def _close(self, live: _Live, error: PhalanxError | None) -> list[Instruction]:
        """End the request: well without an error. A running attempt is cancelled."""
        journal = live.journal
        out: list[Instruction] = []
        if live.target is not None:
            if journal.attempt is not None:
                cancel = shard_pb2.CancelAttempt(
                    request_id=journal.request_id, attempt=journal.attempt.number
                )
                out.append(CancelAttempt(live.target, cancel))
            out += self._leave(live, "" if error is None else error.reason)
        if error is None:
            self.counters.finished += 1
        else:
            journal.fail(error)
            self.counters.failed += error.reason not in _OF_CLIENTS
            self.counters.lost += journal.accepted and error.reason not in (*_OF_CLIENTS, "DEADLINE_EXCEEDED")
        del self._live[journal.request_id]
        return [*out, Wake(journal)]

    def check_integrity(self) -> None:
        """Raise AssertionError when the books do not balance."""
        sent = _count(
            (live.target.replica, len(live.journal.choices)) for live in self._live.values() if live.target
        )
        for replica, route in self.router.routes.items():
            assert route.sent == sent.get(replica, 0), (
                f"{replica}: {route.sent} sent, {sent.get(replica, 0)} live"
            )
        for live in self._live.values():
            assert not live.journal.closed
            assert (live.target is None) == (live.journal.attempt is None)


def _count(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for name, number in pairs:
        total[name] = total.get(name, 0) + number
    return total
