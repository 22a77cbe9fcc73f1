"""`phalanx shard-model`: writes one weights file per rank, so that a host needs only its own ranks' files."""

from __future__ import annotations

from pathlib import Path

import click

from phalanx.cli.failure import Failure

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("source", type=_DIRECTORY)
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="Tensor-parallel size.")
@click.option(
    "--pp", type=click.IntRange(min=1), default=1, show_default=True, help="Pipeline-parallel size."
)
def shard_model(source: Path, destination: Path, tp: int, pp: int) -> None:
    """Write the model in SOURCE to DESTINATION as one file per rank of a layout.

    The files are `pp{i}_tp{j}.safetensors`. A host needs the files of its own ranks, the JSON files and the
    tokeniser. The identity of the model stays: a request can move between replicas that load SOURCE and
    replicas that load DESTINATION.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from engine.errors import ModelError
    from engine.weights.shard_model import shard_model as write

    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=None)
        try:
            paths = write(
                source, destination, tp, pp, lambda done, total: bar.update(task, completed=done, total=total)
            )
        except ModelError as error:
            raise Failure(error.message) from error
    for path in paths:
        click.echo(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
