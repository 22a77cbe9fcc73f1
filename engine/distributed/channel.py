"""Plans from the leader to every rank and drawn tokens back, over one TCP connection each.

Frames are a 4-byte length and bytes. Apart from the tensors' collectives, so that a rank can wait for
its next plan without holding a collective open, and sees at once when the leader has gone.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from engine.errors import EngineError
from engine.plan import Sampled, StepPlan
from engine.plan_codec import decode_plan, decode_sampled, encode_plan, encode_sampled

_LENGTH = struct.Struct("<I")
_HELLO = struct.Struct("<qI")  # epoch, rank
_ACCEPT_TIMEOUT_S = 600.0
_HELLO_TIMEOUT_S = 5.0
_CHECK_INTERVAL_S = 0.2


class HasFileno(Protocol):
    """Something that `select` can watch."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


class PlanHub:
    """The leader's end: listens on `host` only, then speaks to ranks 1 to `world - 1`."""

    def __init__(self, host: str, world: int, epoch: int) -> None:
        self._world, self._epoch = world, epoch
        self._listener = socket.create_server((host, 0), backlog=world)
        self._listener.settimeout(_ACCEPT_TIMEOUT_S)
        self._ranks: dict[int, socket.socket] = {}

    @property
    def address(self) -> str:
        """`host:port`."""
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    def gather(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until every rank has connected; `check` is called meanwhile and raises if one never will."""
        deadline = time.monotonic() + _ACCEPT_TIMEOUT_S
        while len(self._ranks) < self._world - 1:
            check()
            if not select.select([self._listener], [], [], _CHECK_INTERVAL_S)[0]:
                if time.monotonic() > deadline:
                    raise EngineError("RANK_LOST", "another rank of the replica has not come in time")
                continue
            connection, _ = self._listener.accept()
            connection.settimeout(_HELLO_TIMEOUT_S)
            try:
                epoch, rank = _HELLO.unpack(_receive_exactly(connection, _HELLO.size))
            except EngineError:  # whoever it was has gone, or says nothing
                connection.close()
                continue
            if epoch != self._epoch or not 0 < rank < self._world or rank in self._ranks:
                connection.close()  # a leftover of another epoch
                continue
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._ranks[rank] = connection
        self._listener.close()

    def broadcast(self, plan: StepPlan) -> None:
        """Send a plan to every rank."""
        data = encode_plan(plan)
        for connection in self._ranks.values():
            _send(connection, data)

    def receive(self, rank: int) -> Sampled:
        """What `rank` drew next. Any rank's end is an error, even while waiting for another."""
        connection = self._ranks[rank]
        while True:
            ready, _, _ = select.select(list(self._ranks.values()), [], [])
            if connection in ready:
                return decode_sampled(_receive(connection))
            _refuse(ready)

    def wait(self, beside: HasFileno) -> None:
        """Sleep until `beside` can be read; an error when a rank ends meanwhile."""
        ranks = list(self._ranks.values())
        ready, _, _ = select.select([beside, *ranks], [], [])
        _refuse(rank for rank in ranks if rank in ready)

    def close(self) -> None:
        """End every rank."""
        self._listener.close()
        for connection in self._ranks.values():
            connection.close()


class PlanLink:
    """Another rank's end."""

    def __init__(self, address: str, epoch: int, rank: int) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(_HELLO.pack(epoch, rank))

    def receive(self, beside: Iterable[HasFileno] = ()) -> StepPlan | None:
        """The next plan, or None when one of `beside` can be read, which comes before any plan."""
        ready, _, _ = select.select([self._socket, *beside], [], [])
        if ready != [self._socket]:
            return None
        return decode_plan(_receive(self._socket))

    def send(self, sampled: Sampled) -> None:
        """Tell the leader what was drawn."""
        _send(self._socket, encode_sampled(sampled))

    def close(self) -> None:
        """Leave the group."""
        self._socket.close()


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(_LENGTH.pack(len(data)) + data)
    except OSError as error:
        raise _gone() from error


def _receive(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    return _receive_exactly(connection, length)


def _receive_exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        try:
            part = connection.recv(count - len(data))
        except OSError as error:
            raise _gone() from error
        if not part:
            raise _gone()
        data += part
    return bytes(data)


def _refuse(connections: Iterable[socket.socket]) -> None:
    """Read from ranks that have nothing to say: what can be read is their end."""
    for connection in connections:
        _receive(connection)
        raise EngineError("INTERNAL", "a rank spoke out of turn")


def _gone() -> EngineError:
    return EngineError("RANK_LOST", "another rank of the replica has gone")
