"""`phalanx down`: stop a local cluster."""

from __future__ import annotations

from pathlib import Path

import click

from phalanx.cli import options
from phalanx.cli.local.stop import stop


@click.command()
@options.state_dir
def down(state_dir: Path) -> None:
    """Stop everything that `phalanx up` started in a state directory."""
    stopped = stop(state_dir.resolve())
    click.echo(f"stopped {stopped} processes" if stopped else f"nothing is running in {state_dir}")
