"""Step plans from the leader to every other rank, and sampled tokens back: one TCP connection per rank.

A frame is a 4-byte little-endian length, then that many bytes. Plans do not travel over collectives, for two
reasons. A rank may wait for its next plan for hours, but a collective times out. And a rank notices a closed
connection at once.
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
    """The leader's side: a connection to each of the ranks 1 to `world - 1`.

    Owns: the listening socket, on `host` only, and the connections. Does not own: what plans say.
    """

    def __init__(self, host: str, world: int, epoch: int) -> None:
        self._world, self._epoch = world, epoch
        self._listener = socket.create_server((host, 0), backlog=world)
        self._listener.settimeout(_ACCEPT_TIMEOUT_S)
        self._ranks: dict[int, socket.socket] = {}

    @property
    def address(self) -> str:
        """`host:port` of the listening socket."""
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    def gather(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until every rank has connected.

        Args:
            check: called several times a second meanwhile; raises if a rank will never connect.

        Raises:
            EngineError: RANK_LOST, when a rank has not connected in time.
        """
        deadline = time.monotonic() + _ACCEPT_TIMEOUT_S
        while len(self._ranks) < self._world - 1:
            check()
            if time.monotonic() > deadline:
                raise EngineError("RANK_LOST", "another rank of the replica has not connected in time")
            if not select.select([self._listener], [], [], _CHECK_INTERVAL_S)[0]:
                continue
            connection, _ = self._listener.accept()
            connection.settimeout(_HELLO_TIMEOUT_S)
            try:
                epoch, rank = _HELLO.unpack(_receive_exactly(connection, _HELLO.size))
            except EngineError:  # not a rank, or a rank that has ended
                connection.close()
                continue
            if epoch != self._epoch or not 0 < rank < self._world or rank in self._ranks:
                connection.close()  # a rank of another epoch, or one that is connected already
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
        """The next sample of `rank`.

        Raises:
            EngineError: RANK_LOST, when any rank ends meanwhile, not only `rank`.
        """
        connection = self._ranks[rank]
        while True:
            ready, _, _ = select.select(list(self._ranks.values()), [], [])
            if connection in ready:
                return decode_sampled(_receive(connection))
            _check_alive(ready)

    def wait(self, beside: HasFileno) -> None:
        """Sleep until `beside` can be read.

        Raises:
            EngineError: RANK_LOST, when a rank ends meanwhile.
        """
        ranks = list(self._ranks.values())
        ready, _, _ = select.select([beside, *ranks], [], [])
        _check_alive(rank for rank in ranks if rank in ready)

    def close(self) -> None:
        """Close all connections, which ends the other ranks."""
        self._listener.close()
        for connection in self._ranks.values():
            connection.close()


class PlanLink:
    """The connection of another rank to the leader."""

    def __init__(self, address: str, epoch: int, rank: int) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(_HELLO.pack(epoch, rank))

    def receive(self, beside: Iterable[HasFileno] = ()) -> StepPlan | None:
        """Wait for the next plan, or return None as soon as one of `beside` can be read.

        When both can be read, `beside` comes first: a busy rank must notice that its parent has gone.

        Raises:
            EngineError: RANK_LOST, when the leader has gone.
        """
        ready, _, _ = select.select([self._socket, *beside], [], [])
        if ready != [self._socket]:
            return None
        return decode_plan(_receive(self._socket))

    def send(self, sampled: Sampled) -> None:
        """Send the leader this rank's sample."""
        _send(self._socket, encode_sampled(sampled))

    def close(self) -> None:
        """Close the connection."""
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


def _check_alive(readable: Iterable[socket.socket]) -> None:
    """Raise an error if a connection can be read although no sample is due: its rank has gone."""
    for connection in readable:
        _receive(connection)  # raises RANK_LOST
        raise EngineError("INTERNAL", "a rank sent a sample that no step asked for")


def _gone() -> EngineError:
    return EngineError("RANK_LOST", "another rank of the replica has gone")
