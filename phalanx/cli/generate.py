"""`phalanx generate`: stream a completion to the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from phalanx.cli import options
from phalanx.cli.control import gateways_of, run


@click.command()
@click.argument("prompt", required=False)
@click.option("--model", required=True, help="The deployment's name.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), help="0 always takes the most likely token.")
@click.option("--top-k", type=click.IntRange(min=0))
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True))
@click.option("--min-p", type=click.FloatRange(0, 1))
@click.option("--seed", type=click.IntRange(min=0), help="The same seed and request give the same tokens.")
@click.option("--stop", multiple=True, help="A text that ends the completion; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Ignore the end of sequence; stop at --max-tokens.")
@click.option(
    "--gateway", metavar="HOST:PORT,...", help="The gateways, instead of those in the state directory."
)
@options.state_dir
def generate(
    prompt: str | None,
    model: str,
    max_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    ignore_eos: bool,
    gateway: str | None,
    state_dir: Path,
) -> None:
    """Stream the completion of PROMPT, or of standard input, to the terminal."""
    targets = gateways_of(state_dir, gateway)
    text = sys.stdin.read() if prompt is None else prompt

    async def streamed() -> None:
        from phalanx.client import Client

        async with Client(*targets) as client:
            async for event in client.generate(
                model,
                text,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                seed=seed,
                stop=stop,
                ignore_eos=ignore_eos,
            ):
                click.echo(event.chunk.text, nl=False)

    run(targets[0], streamed())
    click.echo()
