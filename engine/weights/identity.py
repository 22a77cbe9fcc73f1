"""When two engines run the same model, so that one may continue a request of the other. Imports no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

from engine.config import TOKENIZER_FILES, EngineConfig
from engine.weights.checkpoint import CONFIG_FILES, weight_files, weights_digest
from engine.weights.manifest import read_manifest
from engine.weights.model_config import ModelConfig


def model_hash(model_dir: str | Path, *, dummy: bool = False) -> str:
    """A hash of a model's configuration, tokeniser files, and a sample of its weights.

    A sharded copy has the hash of its source. With `dummy`, the weights follow from the configuration, so
    they are not part of the hash.
    """
    directory = Path(model_dir)
    digest = hashlib.sha256()
    for name in (*CONFIG_FILES, *TOKENIZER_FILES):
        path = directory / name
        digest.update(f"{name}\0".encode())
        digest.update(path.read_bytes() if path.is_file() else b"-")
    digest.update(("dummy" if dummy else _weights(directory)).encode())
    return digest.hexdigest()[:32]


def engine_identity(engine: EngineConfig, config: ModelConfig) -> str:
    """A hash of all that decides which tokens an engine generates: model, dtype, quantisation, rope."""
    facts = (
        model_hash(engine.model, dummy=engine.load_format == "dummy"),
        engine.dtype_name,
        engine.quantization,
        repr(config.rope),  # longrope depends on the maximum length that is served
    )
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def _weights(directory: Path) -> str:
    manifest = read_manifest(directory)
    return weights_digest(weight_files(directory)) if manifest is None else manifest.source
