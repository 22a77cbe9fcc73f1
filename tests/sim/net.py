"""The network between simulated processes: ordered connections that can break, be late, or be cut."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.sim.loop import Process, SimLoop

KEEPALIVE_S = 4.0
CONNECT_S = 1.0
_CLOSED = object()


@dataclass
class End:
    """One end of a connection; belongs to a process."""

    process: Process
    inbox: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    other: End | None = None
    arrives: float = 0.0  # arrival time of the last item sent to this end
    late: list[Any] = field(default_factory=list)  # sent while the network was cut
    closed: bool = False
    why: object = None

    async def get(self) -> Any:
        """The next item from the other side. Raises ConnectionError when closed; `why` has the reason."""
        item = await self.inbox.get()
        if item is _CLOSED:
            self.closed = True
            self.inbox.put_nowait(_CLOSED)  # later calls must see it, too
            raise ConnectionError
        return item


class Network:
    """Latencies are random; the items of one connection arrive in order."""

    def __init__(self, loop: SimLoop, chance: random.Random) -> None:
        self._loop, self._chance = loop, chance
        self._cut: set[frozenset[str]] = set()
        self._servers: dict[str, tuple[Process, Callable[[End], Awaitable[None]]]] = {}
        self._connections: list[tuple[End, End]] = []
        self.latency_s = 0.001

    def listen(self, address: str, process: Process, serve: Callable[[End], Awaitable[None]]) -> None:
        """Accept connections at an address. A later listener replaces an earlier one."""
        self._servers[address] = process, serve

    async def connect(self, process: Process, address: str) -> End:
        """Connect to an address; returns this side's end. Raises ConnectionError."""
        await asyncio.sleep(self._delay())
        server = self._servers.get(address)
        if server is None or not server[0].alive:
            raise ConnectionError(f"no process listens at {address}")
        if self.is_cut(process, server[0]):
            await asyncio.sleep(CONNECT_S)
            raise ConnectionError(f"{address} does not answer")
        ours, theirs = End(process), End(server[0])
        ours.other, theirs.other = theirs, ours
        self._connections.append((ours, theirs))
        for end in (ours, theirs):
            end.process.on_death.append(lambda end=end: self._broken(end))
        theirs.process.later(self._delay(), self._accept, server[1], theirs)
        return ours

    def _accept(self, serve: Callable[[End], Awaitable[None]], end: End) -> None:
        end.process.start(serve(end))  # type: ignore[arg-type]

    def send(self, end: End, item: Any) -> None:
        """Send from this end to the other."""
        other = end.other
        assert other is not None
        if end.closed:
            return
        if self.is_cut(end.process, other.process):
            other.late.append(item)
        else:
            self._deliver(other, item)

    def close(self, end: End, why: object = None) -> None:
        """Close from this end. Items sent before still arrive, before the other side sees the end."""
        if end.closed:
            return
        end.closed = True
        assert end.other is not None
        end.other.why = why
        if self.is_cut(end.process, end.other.process):
            end.other.late.append(_CLOSED)
        else:
            self._deliver(end.other, _CLOSED)
        end.inbox.put_nowait(_CLOSED)

    def is_cut(self, one: Process, other: Process) -> bool:
        """Whether the network between two processes is cut."""
        return frozenset((_host(one), _host(other))) in self._cut

    def cut(self, one: str, other: str) -> None:
        """Cut the network between two hosts until `mend`."""
        pair = frozenset((one, other))
        self._cut.add(pair)
        self._loop.call_later(KEEPALIVE_S, self._missed, pair)

    def mend(self, one: str, other: str) -> None:
        """Mend a cut. Items sent meanwhile arrive now, in order."""
        pair = frozenset((one, other))
        self._cut.discard(pair)
        for connection in self._connections:
            if frozenset(_host(end.process) for end in connection) == pair:
                for end in connection:
                    late, end.late = end.late, []
                    for item in late:
                        self._deliver(end, item)

    def break_between(self, host: str, others: str) -> None:
        """Break the connections between a host and those whose names begin with `others`. Both sides live."""
        for connection in list(self._connections):
            one, other = (_host(end.process) for end in connection)
            if (one == host and other.startswith(others)) or (other == host and one.startswith(others)):
                for end in connection:
                    self._broken_at(end)

    def _missed(self, pair: frozenset[str]) -> None:
        if pair in self._cut:
            for connection in list(self._connections):
                if frozenset(_host(end.process) for end in connection) == pair:
                    for end in connection:
                        self._broken_at(end)

    def _broken(self, dead: End) -> None:
        """A process has died: the other side sees its connection end, unless the network is cut."""
        dead.closed = True
        other = dead.other
        assert other is not None
        if not self.is_cut(dead.process, other.process):
            self._deliver(other, _CLOSED)

    def _broken_at(self, end: End) -> None:
        end.closed = True
        end.process.later(0, end.inbox.put_nowait, _CLOSED)

    def _deliver(self, end: End, item: Any) -> None:
        end.arrives = max(end.arrives + 1e-9, self._loop.time() + self._delay())
        end.process.later(end.arrives - self._loop.time(), end.inbox.put_nowait, item)

    def _delay(self) -> float:
        return self.latency_s * self._chance.uniform(0.2, 2.0)


def _host(process: Process) -> str:
    return process.name.partition("/")[0]
