"""The torch engine: one replica of a model over tensor- and pipeline-parallel ranks.

It can be used alone: `from engine import Engine`. Neither this package nor the modules that other processes
import (`config`, `request`, `ipc.wire`) import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.api import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    """Import the engine, and torch with it, on first use (PEP 562)."""
    if name == "Engine":
        from engine.api import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
