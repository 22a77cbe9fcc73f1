"""Which packages and modules an import of the engine's modules loads."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

from engine.processes import forkserver, replica_group, startup

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


def imported_in_functions(module: ModuleType) -> set[str]:
    """The engine's modules that a module imports inside functions."""
    found: set[str] = set()
    for function in ast.parse(inspect.getsource(module)).body:
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("engine."):
                    names = {f"{node.module}.{alias.name}" for alias in node.names}
                    found |= {name for name in names if is_module(name)} or {node.module}
    return found


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent is a module, not a package
        return False


def test_a_forked_engine_need_not_import_the_modules_of_its_start() -> None:
    needed = imported_in_functions(startup) | imported_in_functions(replica_group)
    needed.remove("engine.execution.cuda_graphs")  # for GPUs only: it needs Triton
    code = f"import sys, {', '.join(forkserver.PRELOADED)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert len(needed) > 5
    assert needed <= set(run.stdout.split())


def test_the_text_process_does_without_torch() -> None:
    modules = loaded(
        "engine.text.process; engine.text.tokenizer.forgo_torch(); "
        "import transformers.models.auto.tokenization_auto"
    )
    assert "tokenizers" in modules
    assert not modules & {"torch", "grpc", "aetcd"}
