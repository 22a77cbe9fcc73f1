"""`phalanx get`: show deployments, replicas, workers or gateways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from phalanx.cli import options, output
from phalanx.cli.control import DEADLINE_S, call, controller_of, every


@dataclass(frozen=True, slots=True)
class Kind:
    """How to get and to show one kind of thing.

    `singular` and `plural` name it in the API's methods, as in GetWorker and ListWorkers.
    """

    singular: str
    plural: str
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
        "Deployment",
        "Deployments",
        ("name", "state", "ready_replicas", "replicas", "tp", "pp", "revision", "reason"),
        _deployment,
    ),
    "replicas": Kind(
        "Replica",
        "Replicas",
        ("replica", "deployment", "state", "epoch", "tp", "pp", "workers", "reason"),
        _replica,
    ),
    "workers": Kind(
        "Worker",
        "Workers",
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
    "gateways": Kind("Gateway", "Gateways", ("gateway", "host", "grpc_address", "http_url", "pid")),
}


@click.command()
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("name", required=False)
@options.output
@options.controller
@options.state_dir
def get(kind: str, name: str | None, output_format: str, controller: str | None, state_dir: Path) -> None:
    """List deployments, replicas, workers or gateways, or show only the one with the name NAME."""
    rows = fetch(kind, controller_of(state_dir, controller), name)
    click.echo(output.render(rows, KINDS[kind].columns, output_format))


def fetch(kind: str, target: str, name: str | None = None) -> list[dict[str, Any]]:
    """All things of a kind in `KINDS`, or only the one named `name`, from the controller at `target`.

    Raises:
        Failure: with the exit code NOT_FOUND when nothing has the name.
    """
    from phalanx.v1 import control_pb2

    entry = KINDS[kind]
    method = f"List{entry.plural}" if name is None else f"Get{entry.singular}"
    request = getattr(control_pb2, f"{method}Request")()

    async def fetched(stub: Any) -> list[Any]:
        if name is None:
            return [item async for item in every(getattr(stub, method), request, kind, timeout=DEADLINE_S)]
        request.name = name
        response = await getattr(stub, method)(request, timeout=DEADLINE_S)
        return [getattr(response, entry.singular.lower())]

    return [entry.row(message) for message in call(target, fetched)]
