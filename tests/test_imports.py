"""What each process loads, seen in a clean interpreter.

The planes carry no torch and nothing built from Rust; the engine carries no network code.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LISTING = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
names = {name.partition(".")[0] for name in sys.modules}
files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
print(json.dumps([sorted(names), sorted(file for file in files if file and file.endswith(".so"))]))
"""
PLANES = ["dataplane.gateway.main", "dataplane.shard.main", "controlplane.main", "phalanx.client"]
HEAVY = {"torch", "transformers", "numpy"}
BUILT_FROM_RUST = {
    "tokenizers",
    "safetensors",
    "pydantic_core",
    "orjson",
    "cryptography",
    "hf_xet",
    "jiter",
    "rpds",
    "tiktoken",
    "watchfiles",
}
NETWORK = {"grpc", "aetcd", "aiohttp", "google", "opentelemetry"}
# Panic messages keep the path of the standard library's sources in every binary that rustc links.
RUST_MARKS = (b"/rustc/", b"rust_panic", b"rust_eh_personality")


def loaded_by(module: str) -> tuple[set[str], list[Path]]:
    """Top-level modules and extension files that importing `module` loads."""
    done = subprocess.run([sys.executable, "-c", LISTING, module], capture_output=True, text=True, check=True)
    names, files = json.loads(done.stdout.splitlines()[-1])
    return set(names), [Path(file) for file in files]


def is_rust(path: Path) -> bool:
    data = path.read_bytes()
    return any(mark in data for mark in RUST_MARKS)


@pytest.mark.parametrize("module", PLANES)
def test_a_plane_loads_no_torch_and_no_rust(module: str) -> None:
    names, extensions = loaded_by(module)
    assert not names & (HEAVY | BUILT_FROM_RUST)
    assert extensions, "gRPC alone has one"
    assert [path.name for path in extensions if is_rust(path)] == []


@pytest.mark.parametrize("module", ["engine.processes.rank", "engine.text.process", "engine.processes.core"])
def test_the_engine_loads_no_network_code(module: str) -> None:
    names, _ = loaded_by(module)
    assert not names & (NETWORK | {"controlplane", "dataplane", "phalanx"})


def test_the_engines_ranks_load_no_transformers() -> None:
    """Its import costs more than a restart may."""
    names, _ = loaded_by("engine.processes.core")
    assert "torch" in names
    assert not names & {"transformers", "tokenizers"}


def test_the_look_at_binaries_knows_rust_when_it_sees_it() -> None:
    _, extensions = loaded_by("tokenizers")
    assert any(is_rust(path) for path in extensions)
