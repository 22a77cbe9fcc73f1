"""Bugs planted on purpose, each a context manager. The simulation must find every one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from dataplane.gateway.dispatcher import Dispatcher
from dataplane.gateway.resume import Cursor, Ticket
from dataplane.shard import convert
from dataplane.shard.server import ShardServer
from dataplane.shard.watchdog import Pulse, Watchdog
from phalanx.internal.v1 import shard_pb2
from tests.sim.model import Rank


@contextlib.contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def epoch_not_checked() -> Iterator[None]:
    """A leader admits gateways of any epoch, and a gateway accepts frames of any epoch."""

    def admit(before: Any) -> Any:
        def any_epoch(self: ShardServer, first: Any) -> Any:
            if self.leader is not None and hasattr(first, "hello"):
                first.hello.epoch = self.leader.epoch
            return before(self, first)

        return any_epoch

    def frame(before: Any) -> Any:
        def any_epoch(self: Dispatcher, target: Any, frame: shard_pb2.StepFrame, now: float) -> Any:
            frame = shard_pb2.StepFrame.FromString(frame.SerializeToString())
            frame.epoch = target.epoch
            return before(self, target, frame, now)

        return any_epoch

    with _replaced(ShardServer, "_admit", admit), _replaced(Dispatcher, "frame", frame):
        yield


@contextlib.contextmanager
def sampler_with_a_state() -> Iterator[None]:
    """Noise is keyed by the number of tokens that this engine has sampled, not by the output position."""

    def sample(before: Any) -> Any:
        def counted(self: Rank, prefix_hash: int, seed: int, choice: int, position: int) -> int:
            sampled = self.__dict__.setdefault("sampled", {})
            count = sampled.get((seed, choice), 0)
            sampled[seed, choice] = count + 1
            return int(before(self, prefix_hash, seed, choice, count))

        return counted

    with _replaced(Rank, "sample", sample):
        yield


@contextlib.contextmanager
def resumed_at_the_wrong_index() -> Iterator[None]:
    """A resumed stream begins one position early."""

    def cursor(before: Any) -> Any:
        def early(self: Ticket, text: str) -> Cursor:
            return tuple(max(0, position - 1) for position in before(self, text))

        return early

    with _replaced(Ticket, "cursor", cursor):
        yield


@contextlib.contextmanager
def finish_dropped() -> Iterator[None]:
    """A leader gives a request to another gateway without its finish reason, so the stream never ends."""

    def extend(before: Any) -> Any:
        def without(output: shard_pb2.Delta, news: shard_pb2.Delta) -> None:
            before(output, news)
            output.finish_reason = 0  # type: ignore[assignment]

        return without

    with _replaced(convert, "extend", extend):
        yield


@contextlib.contextmanager
def hung_engine_looks_healthy() -> Iterator[None]:
    """A worker never notices that its engine has stopped computing."""

    def check(before: Any) -> Any:
        return lambda self, now: None

    with _replaced(Watchdog, "check", check), _replaced(Pulse, "check", check):
        yield


BUGS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "epoch not checked": epoch_not_checked,
    "sampler with a state": sampler_with_a_state,
    "resumed at the wrong index": resumed_at_the_wrong_index,
    "finish dropped": finish_dropped,
    "hung engine looks healthy": hung_engine_looks_healthy,
}
