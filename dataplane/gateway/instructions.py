"""The dispatcher's decisions: instructions that the gateway carries out, in order."""

from __future__ import annotations

from dataclasses import dataclass

from dataplane.gateway.journal import Journal
from dataplane.gateway.router import Target
from phalanx.internal.v1 import shard_pb2


@dataclass(frozen=True, slots=True)
class Submit:
    """Send an attempt to a replica."""

    target: Target
    journal: Journal
    message: shard_pb2.Submit
    failover_reason: str  # why the previous attempt ended; empty for the first attempt


@dataclass(frozen=True, slots=True)
class CancelAttempt:
    """Tell a replica to drop an attempt."""

    target: Target
    message: shard_pb2.CancelAttempt


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt is over. `error` is the reason, empty if the attempt finished the request."""

    journal: Journal
    error: str


@dataclass(frozen=True, slots=True)
class Wake:
    """The journal has changed: wake its client's reader."""

    journal: Journal


@dataclass(frozen=True, slots=True)
class Distrust:
    """A replica broke the protocol: close its stream."""

    target: Target
    reason: str


@dataclass(frozen=True, slots=True)
class CloseSilent:
    """A replica's silence timeout has passed: close its stream. Its process hangs, or the network is cut."""

    target: Target
    reason: str


@dataclass(frozen=True, slots=True)
class Attach:
    """Ask a replica for a request that another gateway began."""

    target: Target
    message: shard_pb2.Attach


@dataclass(frozen=True, slots=True)
class Found:
    """A search has ended: the replica `target` holds the request, and this gateway owns it from now on."""

    target: Target
    journal: Journal


@dataclass(frozen=True, slots=True)
class NotHeld:
    """A search has ended without a replica that holds the request.

    `certain`: every replica of the deployment has answered that it does not hold the request.
    """

    resume_key: str
    certain: bool = True


Instruction = Submit | CancelAttempt | AttemptEnded | Wake | Distrust | CloseSilent | Attach | Found | NotHeld
