"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

state_dir = click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".phalanx"),
    show_default=True,
    help="Where `phalanx up` keeps the cluster's addresses, logs and data.",
)
controller = click.option(
    "--controller", metavar="HOST:PORT", help="The controller, instead of the one in the state directory."
)
output = click.option(
    "-o",
    "--output",
    "output_format",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    show_default=True,
    help="How to print.",
)
