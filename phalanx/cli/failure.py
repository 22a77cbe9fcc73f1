"""How a command fails: with one sentence on standard error and an exit code for scripts."""

from __future__ import annotations

from typing import IO, Any

import click

FAILED = 1
USAGE = 2
NOT_FOUND = 3
UNREACHABLE = 4


class Failure(click.ClickException):
    """Ends the command with a sentence and an exit code."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it here too

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the sentence."""
        click.echo(f"phalanx: {self.message}", file=file, err=True)
