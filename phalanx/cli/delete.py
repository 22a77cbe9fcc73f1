"""`phalanx delete`: remove a deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phalanx.cli import options
from phalanx.cli.control import DEADLINE_S, call, controller_of


@click.group()
def delete() -> None:
    """Remove a deployment from the cluster."""


@delete.command()
@click.argument("name")
@options.controller
@options.state_dir
def deployment(name: str, controller: str | None, state_dir: Path) -> None:
    """Remove the deployment NAME and its replicas."""
    from phalanx.v1 import control_pb2

    async def deleted(stub: Any) -> None:
        await stub.DeleteDeployment(control_pb2.DeleteDeploymentRequest(name=name), timeout=DEADLINE_S)

    call(controller_of(state_dir, controller), deleted)
    click.echo(f"deployment {name} deleted")
