"""`phalanx check-model`: checks whether a model directory can be served, and names what is wrong."""

from __future__ import annotations

from pathlib import Path

import click

from phalanx.cli.failure import Failure


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--check-nan", is_flag=True, help="Also read every value, and refuse NaN and infinite ones.")
def check_model(model: Path, check_nan: bool) -> None:
    """Check that MODEL has every tensor of its architecture, complete and of the right shape.

    An error names the file, the tensor and, with --check-nan, the first wrong element.
    """
    from rich.progress import Progress

    from engine.errors import ModelError
    from engine.weights.check_model import check_model as check

    with Progress(transient=True, disable=not check_nan) as bar:
        task = bar.add_task("reading", total=None)
        try:
            unknown = check(
                model,
                values=check_nan,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except ModelError as error:
            raise Failure(error.message) from error
    for name in unknown:
        click.echo(f"{name} is no part of the model and will not be loaded", err=True)
    click.echo(f"{model} can be served")
