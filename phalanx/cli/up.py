"""`phalanx up`: a whole cluster on this machine, serving one model."""

from __future__ import annotations

import asyncio
import functools
import re
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click

from phalanx.cli import cluster, options
from phalanx.cli.failure import USAGE, Failure
from phalanx.cli.local import retire
from phalanx.cli.local.spec import LocalSpec, log_path
from phalanx.cli.local.starter import Starter
from phalanx.cli.rollout import Say, roll_out

PORT = click.IntRange(0, 65535)


@click.command()
@click.option(
    "--model",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A Hugging Face model directory.",
)
@click.option("--name", help="The deployment's name.  [default: the directory's name]")
@click.option("--replicas", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="Tensor-parallel size.")
@click.option(
    "--pp", type=click.IntRange(min=1), default=1, show_default=True, help="Pipeline-parallel size."
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Worker processes.  [default: replicas x tp x pp]"
)
@click.option("--gateways", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: the engine's choice]"
)
@click.option(
    "--quantization",
    type=click.Choice(["int8", "fp8", "int4"]),
    help="Quantisation of the weights.  [default: none]",
)
@click.option(
    "--load-format",
    type=click.Choice(["auto", "dummy"]),
    default="auto",
    show_default=True,
    help="dummy makes random weights from config.json alone.",
)
@click.option(
    "--http-port",
    type=PORT,
    default=8000,
    show_default=True,
    help="0 picks a free port, as all further gateways do.",
)
@click.option("--grpc-port", type=PORT, default=8001, show_default=True, help="As --http-port.")
@click.option("--etcd", metavar="HOST:PORT,...", help="Use this etcd instead of starting one.")
@click.option(
    "--cluster", "name_in_etcd", default="default", show_default=True, help="The cluster's name within etcd."
)
@click.option(
    "--timeout", type=float, default=300.0, show_default=True, help="Seconds until every replica is ready."
)
@click.option(
    "--detach", is_flag=True, help="Return once every replica is ready; `phalanx down` stops the cluster."
)
@options.state_dir
def up(
    model: Path,
    name: str | None,
    replicas: int,
    tp: int,
    pp: int,
    workers: int | None,
    gateways: int,
    device: str,
    dtype: str | None,
    quantization: str | None,
    load_format: str,
    http_port: int,
    grpc_port: int,
    etcd: str | None,
    name_in_etcd: str,
    timeout: float,
    detach: bool,
    state_dir: Path,
) -> None:
    """Start etcd, a controller, workers and gateways on this machine and serve a model.

    Everything listens on loopback. A process that dies is started again. Without --detach the cluster
    runs until Ctrl-C. Other commands find the cluster by its state directory.
    """
    from phalanx.v1 import control_pb2

    model = model.resolve()
    deployment = control_pb2.DeploymentSpec(
        name=name or deployment_name(model),
        model=str(model),
        replicas=replicas,
        tp=tp,
        pp=pp,
        dtype=dtype or "",
        quantization=quantization or "",
        load_format=load_format,
    )
    spec = LocalSpec(
        state_dir=str(state_dir.resolve()),
        workers=workers or replicas * tp * pp,
        gateways=gateways,
        device=device,
        devices=_devices() if device == "cuda" else 1,
        http_port=http_port,
        grpc_port=grpc_port,
        etcd=tuple(etcd.split(",")) if etcd else (),
        cluster=name_in_etcd,
    )
    _run(spec, deployment, timeout, detach)


def _run(spec: LocalSpec, deployment: Any, timeout_s: float, detach: bool) -> None:
    """Start the cluster; leave it running with --detach, else stop it at a signal. A failure stops it too."""
    say = Speaker()
    starter = Starter(spec)
    try:
        asyncio.run(_interruptible(_serve(starter, spec, deployment, timeout_s, detach, say)))
    except TimeoutError:
        starter.stop()
        raise Failure(f"not ready within {timeout_s:.0f} s: {say.last}") from None
    except asyncio.CancelledError:
        say("stopping")
        starter.stop()
        if detach:
            raise Failure("interrupted; nothing was left running") from None
    except BaseException:
        starter.stop()
        raise


async def _interruptible(work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; SIGINT and SIGTERM cancel it."""
    task = asyncio.current_task()
    assert task is not None
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
    await work


async def _serve(
    starter: Starter, spec: LocalSpec, deployment: Any, timeout_s: float, detach: bool, say: Say
) -> None:
    """Wait until the deployment is ready; without --detach also until the supervisor ends."""
    ended = Failure(f"the supervisor ended; see {log_path(spec, 'supervisor')}")
    progress = starter.progress()
    async with asyncio.timeout(timeout_s):
        async for item in progress:
            if "failed" in item:
                raise Failure(item["failed"])
            if "up" in item:
                break
            say(f"{item['served']} serves")
        else:
            raise ended
        running = cluster.read(Path(spec.state_dir))
        assert running is not None
        applied = functools.partial(retire.note, Path(spec.state_dir), deployment.name)
        await roll_out(running.controller, running.grpc, deployment, say, applied)
    click.echo(f"{deployment.name} is served at {running.http}/v1 (OpenAI) and {running.grpc} (gRPC)")
    if detach:
        starter.release()
        return
    async for _ in progress:
        pass
    raise ended


class Speaker:
    """Prints progress on standard error, without repeating a line."""

    def __init__(self) -> None:
        self.last = "starting"

    def __call__(self, line: str) -> None:
        """Print a line unless it equals the last one."""
        if line != self.last:
            self.last = line
            click.echo(line, err=True)


def deployment_name(model: Path) -> str:
    """A deployment name made from the directory's name: lower-case letters, digits, '-' and '.'."""
    name = re.sub(r"[^a-z0-9.-]+", "-", model.name.lower()).strip("-.")
    if not name:
        raise Failure(f"{model.name} makes no deployment name; give one with --name", USAGE)
    return name


def _devices() -> int:
    """The number of CUDA devices on this machine. Raises Failure when there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as error:
        raise Failure(f"no CUDA device can be used: {error}") from error
    if not count:
        raise Failure("this machine has no CUDA device")
    return count
