"""What each of the engine's modules brings along."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOOK = "import sys, {module}; print(*[m for m in sys.modules if '.' not in m and sys.modules[m]])"


def loaded(module: str) -> set[str]:
    """Top-level modules of a fresh interpreter that has imported `module`."""
    command = [sys.executable, "-c", LOOK.format(module=module)]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "engine",
        "engine.config",
        "engine.ipc.wire",
        "engine.processes.rank",
        "engine.scheduling.scheduler",
        "engine.text.process",
    ],
)
def test_what_others_share_loads_no_torch(module: str) -> None:
    assert not loaded(module) & {"torch", "numpy", "transformers", "safetensors", "grpc", "google"}


def test_a_rank_loads_neither_transformers_nor_network_code() -> None:
    modules = loaded(
        "engine.execution.runner, engine.weights.loader, engine.processes.core, engine.processes.rank"
    )
    assert "torch" in modules
    assert not modules & {"transformers", "tokenizers", "grpc", "aetcd", "google", "aiohttp", "phalanx"}


def test_the_text_process_does_without_torch() -> None:
    modules = loaded(
        "engine.text.process; engine.text.tokenizer.forgo_torch(); "
        "import transformers.models.auto.tokenization_auto"
    )
    assert "tokenizers" in modules
    assert not modules & {"torch", "grpc", "aetcd"}
