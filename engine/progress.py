"""Progress bars for the engine as a library: while it loads, and during `Engine.generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.request import Load

Advance = Callable[[int, int, Load], None]


@contextmanager
def loading_bar(shown: bool | None) -> Iterator[Callable[[float], None]]:
    """Yields a function to call with the loaded fraction of the weights; for `shown` see `progress_bar`."""
    if not _is_shown(shown):
        yield lambda fraction: None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("Loading"),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TimeElapsedColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=1.0)
        yield lambda fraction: bars.update(task, completed=fraction)


@contextmanager
def progress_bar(total: int, before: Load, shown: bool | None) -> Iterator[Advance]:
    """Yields a function to call after each step, with the completions ended, the tokens and the load.

    Args:
        total: number of completions.
        before: the load at the start; the bar counts prefix hits from there.
        shown: whether there is a bar; None shows it if standard error is a terminal.
    """
    if not _is_shown(shown):
        yield lambda ended, tokens, load: None
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("Completions"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[state]}"),
        rich.TimeRemainingColumn(compact=True),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=total, state="")
        num_tokens = 0

        def advance(ended: int, tokens: int, load: Load) -> None:
            nonlocal num_tokens
            num_tokens += tokens
            elapsed = bars.tasks[task].elapsed
            bars.update(task, advance=ended, state=describe(num_tokens, elapsed or 0.0, before, load))

        yield advance


def _is_shown(shown: bool | None) -> bool:
    return sys.stderr.isatty() if shown is None else shown


def describe(tokens: int, elapsed: float, before: Load, load: Load) -> str:
    """Tokens per second; also the share of prompt tokens that were cached, if it is not zero."""
    parts = [f"{tokens / elapsed:.0f} tokens/s"] if elapsed > 0 else []
    hits = load.prefix_hits - before.prefix_hits
    if hits:
        parts.append(f"{hits / (load.prefix_tokens - before.prefix_tokens):.0%} of prompts cached")
    return ", ".join(parts)
