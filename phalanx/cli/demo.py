"""`phalanx demo`: kills the engine of a stream, and compares the tokens with an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from phalanx.cli import cluster, sse
from phalanx.cli.failure import Failure

TOKENS = 200
KILL_AT = 40
REQUEST: dict[str, Any] = {
    "prompt": "class Parser:\n    def __init__(self",
    "max_tokens": TOKENS,
    "temperature": 0.7,
    "top_p": 0.95,
    "seed": 2024,
    "ignore_eos": True,
}
FAILOVERS = "phalanx_failovers_total"
_PHALANX = [sys.executable, "-m", "phalanx.cli"]


@click.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    default=Path(".phalanx/demo-model"),
    show_default=True,
    help="The model to serve. It is trained first if it does not exist.",
)
def demo(model: Path) -> None:
    """Show that a stream survives the death of its engine.

    Serves a model from two replicas, streams a completion, kills its engine with SIGKILL, and exits 0 only
    if every token equals the token of an undisturbed run.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if not model.exists():
        _heading("Training a small model on this Python's standard library")
        _phalanx("demo-model", str(model))
    with tempfile.TemporaryDirectory(prefix="phalanx-demo-") as folder:
        _heading("Starting etcd, a controller, two replicas and a gateway")
        with two_replicas(model, Path(folder)) as running:
            before = sse.counter(running.http, FAILOVERS)
            _heading("The undisturbed run")
            undisturbed = undisturbed_run(running.http, model.name)
            _heading("The same request again, and SIGKILL for the engine that serves it")
            killed = killed_run(running.http, model.name, Path(folder))
            failovers = sse.counter(running.http, FAILOVERS) - before
    _report(undisturbed, killed, failovers)


@dataclass(frozen=True, slots=True)
class Killed:
    """A completion whose engine was killed after `at` tokens; `gap_s` is the failover's gap in seconds."""

    completion: sse.Completion
    at: int
    gap_s: float


def undisturbed_run(url: str, model: str) -> sse.Completion:
    """Stream the demo's request and print its text."""
    completion = sse.Completion()
    for completion, text in sse.stream(url, REQUEST | {"model": model}):  # noqa: B007  # the last one is returned
        click.echo(text, nl=False)
    click.echo()
    return completion


def killed_run(url: str, model: str, state_dir: Path) -> Killed:
    """Stream, and kill the engine in the middle. The longest gap after the kill counts as the failover's."""
    workers = json.loads(
        _phalanx("get", "workers", "-o", "json", "--state-dir", str(state_dir), capture=True)
    )
    engines = {worker["replica"]: worker["engine_pid"] for worker in workers}
    at = events = 0
    completion = sse.Completion()
    for completion, text in sse.stream(url, REQUEST | {"model": model}):
        click.echo(click.style(text, fg="green" if at else None), nl=False)
        if not at and len(completion.token_ids) >= KILL_AT:
            os.kill(engines[completion.replica], signal.SIGKILL)
            at, events = len(completion.token_ids), len(completion.arrivals)
            note = f" [SIGKILL: engine {engines[completion.replica]} of {completion.replica}] "
            click.echo(click.style(note, fg="red", bold=True), nl=False)
    click.echo()
    gaps = gaps_of(completion)[events - 1 :]
    if not at or not gaps:
        raise Failure("the stream had ended before its engine could be killed: nothing was shown")
    return Killed(completion, at, max(gaps))


def gaps_of(completion: sse.Completion) -> list[float]:
    """Seconds between each event with tokens and the next one."""
    return [later - earlier for earlier, later in pairwise(completion.arrivals)]


def _report(undisturbed: sse.Completion, killed: Killed, failovers: float) -> None:
    """Print the comparison. Raises Failure unless all tokens are equal and the stream failed over."""
    _heading("The comparison")
    again = killed.completion
    equal = sum(a == b for a, b in zip(undisturbed.token_ids, again.token_ids, strict=False))
    click.echo(f"killed after        {killed.at} of {len(again.token_ids)} tokens, on {again.replica}")
    usual = statistics.mean(gaps_of(undisturbed)) * 1000
    click.echo(
        f"failover gap        {killed.gap_s * 1000:.0f} ms ({usual:.1f} ms between events undisturbed)"
    )
    click.echo(f"failovers           {failovers:.0f}")
    click.echo(f"tokens equal        {equal} of {len(undisturbed.token_ids)}")
    click.echo(f"usage               {again.usage}")
    if failovers < 1:
        raise Failure("the stream did not fail over: the killed engine was not serving it")
    for what in ("token_ids", "text", "finish_reason", "usage"):
        if getattr(again, what) != getattr(undisturbed, what):
            raise Failure(f"the {what} of the disturbed run differ from the undisturbed run's")
    click.secho("The client saw one whole stream, and every token is the same.", fg="green", bold=True)


@contextlib.contextmanager
def two_replicas(model: Path, state_dir: Path) -> Iterator[cluster.Cluster]:
    """A local cluster with two replicas of `model`; stopped on exit, also after an error."""
    place = ["--state-dir", str(state_dir)]
    try:
        shape = ["--model", str(model), "--replicas", "2", "--http-port", "0", "--grpc-port", "0"]
        _phalanx("up", "--detach", *shape, "--name", model.name, *place)
        running = cluster.read(state_dir)
        assert running is not None
        yield running
    finally:
        _phalanx("down", *place)


def _phalanx(*arguments: str, capture: bool = False) -> str:
    """Run another `phalanx` command; returns its output if `capture`, else prints it."""
    done = subprocess.run([*_PHALANX, *arguments], stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        raise Failure(f"`phalanx {arguments[0]}` failed")
    return done.stdout or ""


def _heading(text: str) -> None:
    click.secho(f"\n== {text}", bold=True)
