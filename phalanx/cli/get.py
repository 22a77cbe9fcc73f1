"""`phalanx get`: what the controller knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from phalanx.cli import options, output
from phalanx.cli.control import DEADLINE_S, call, controller_of
from phalanx.cli.failure import NOT_FOUND, Failure


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of thing is listed and shown."""

    key: str
    method: str
    columns: tuple[str, ...]
    row: Callable[[Any], dict[str, Any]] = output.row


def _deployment(message: Any) -> dict[str, Any]:
    """A deployment with its spec's fields beside its own."""
    fields = output.row(message)
    return {**fields.pop("spec"), **fields}


def _replica(message: Any) -> dict[str, Any]:
    return output.row(message) | {"workers": ",".join(shard.worker for shard in message.shards) or None}


KINDS = {
    "deployments": Kind(
        "name",
        "ListDeployments",
        ("name", "state", "ready_replicas", "replicas", "tp", "pp", "revision", "reason"),
        _deployment,
    ),
    "replicas": Kind(
        "replica",
        "ListReplicas",
        ("replica", "deployment", "state", "epoch", "tp", "pp", "workers", "reason"),
        _replica,
    ),
    "workers": Kind(
        "worker",
        "ListWorkers",
        (
            "worker",
            "device",
            "state",
            "replica",
            "epoch",
            "tp_rank",
            "pp_rank",
            "engine_pid",
            "address",
            "reason",
        ),
    ),
    "gateways": Kind("gateway", "ListGateways", ("gateway", "host", "grpc_address", "http_url", "pid")),
}


@click.command()
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("name", required=False)
@options.output
@options.controller
@options.state_dir
def get(kind: str, name: str | None, output_format: str, controller: str | None, state_dir: Path) -> None:
    """List deployments, replicas, workers or gateways, or only the one called NAME."""
    rows = fetch(kind, controller_of(state_dir, controller))
    if name is not None:
        rows = [row for row in rows if row[KINDS[kind].key] == name]
        if not rows:
            raise Failure(f"no {kind.removesuffix('s')} is called {name}", NOT_FOUND)
    click.echo(output.render(rows, KINDS[kind].columns, output_format))


def fetch(kind: str, target: str) -> list[dict[str, Any]]:
    """Every deployment, replica, worker or gateway that the controller at `target` knows."""
    from phalanx.v1 import control_pb2

    entry = KINDS[kind]

    async def listed(stub: Any) -> Any:
        request = getattr(control_pb2, f"{entry.method}Request")()
        return await getattr(stub, entry.method)(request, timeout=DEADLINE_S)

    return [entry.row(message) for message in getattr(call(target, listed), kind)]
