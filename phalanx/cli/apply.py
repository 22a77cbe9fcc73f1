"""`phalanx apply`: create or change the deployments of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from phalanx.cli import options
from phalanx.cli.control import DEADLINE_S, call, controller_of
from phalanx.cli.failure import USAGE, Failure


@click.command()
@click.option(
    "-f",
    "--file",
    "path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    help="A YAML file of deployments, one per document; - reads standard input.",
)
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@options.controller
@options.state_dir
def apply(path: Path, dry_run: bool, controller: str | None, state_dir: Path) -> None:
    """Create the deployments in a file, or change them to its content.

    A document has `name` and `model`, and may have `replicas`, `tp`, `pp`, `dtype`, `quantization`,
    `max_model_len`, `load_format` and `fixed_layout`. A relative `model` is relative to the file's directory.
    """
    with click.open_file(str(path)) as file:
        specs = parse(file.read(), Path.cwd() if str(path) == "-" else path.parent)
    target = controller_of(state_dir, controller)

    async def applied(stub: Any) -> None:
        from phalanx.v1 import control_pb2

        for spec in specs:
            request = control_pb2.ApplyDeploymentRequest(spec=spec, validate_only=dry_run)
            answer = await stub.ApplyDeployment(request, timeout=DEADLINE_S)
            done = "configured" if answer.changed else "unchanged"
            click.echo(f"deployment {spec.name} {done}{' (dry run)' if dry_run else ''}")

    call(target, applied)


def parse(text: str, base: Path) -> list[Any]:
    """The DeploymentSpec of each YAML document. Raises Failure when a document is not a deployment."""
    import yaml

    from phalanx.v1 import control_pb2

    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise Failure(f"the file is not YAML: {' '.join(str(error).split())}", USAGE) from error
    if not documents:
        raise Failure("the file has no deployment", USAGE)
    known = [field.name for field in control_pb2.DeploymentSpec.DESCRIPTOR.fields]
    specs = []
    for document in documents:
        if not isinstance(document, dict) or not {"name", "model"} <= document.keys():
            raise Failure("a deployment needs at least `name` and `model`", USAGE)
        if unknown := [str(key) for key in document if key not in known]:
            raise Failure(f"a deployment has no field {unknown[0]}; it may have {', '.join(known)}", USAGE)
        try:
            spec = control_pb2.DeploymentSpec(**document)
        except (TypeError, ValueError) as error:
            raise Failure(f"deployment {document['name']}: {error}", USAGE) from error
        spec.model = str((base / spec.model).resolve())
        specs.append(spec)
    return specs
