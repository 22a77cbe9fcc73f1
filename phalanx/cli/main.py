"""The `phalanx` command. A subcommand's module is imported when the subcommand is used."""

from __future__ import annotations

import importlib
from typing import Any

import click

_COMMANDS = {
    "up": "phalanx.cli.up:up",
    "down": "phalanx.cli.down:down",
    "apply": "phalanx.cli.apply:apply",
    "get": "phalanx.cli.get:get",
    "delete": "phalanx.cli.delete:delete",
    "generate": "phalanx.cli.generate:generate",
    "check-model": "phalanx.cli.check_model:check_model",
    "shard-model": "phalanx.cli.shard_model:shard_model",
    "demo-model": "phalanx.cli.demo_model:demo_model",
    "demo": "phalanx.cli.demo:demo",
}


class LazyGroup(click.Group):
    """A group whose commands are named in `_COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of typical use."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name].partition(":")
        command: Any = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="phalanx")
def main() -> None:
    """Serve large language models so that no client ever sees a GPU die.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 nothing answers.
    """
