"""Reads a rank's model configuration and refuses what cannot be served. Imports no torch."""

from __future__ import annotations

from engine.config import DTYPES, LOAD_FORMATS, QUANTIZATIONS, EngineConfig
from engine.errors import ModelError
from engine.weights.locate import check_weights
from engine.weights.model_config import ModelConfig, check_layout


def load_config(engine: EngineConfig) -> ModelConfig:
    """Read the model's config.json and refuse what cannot be served, before torch takes seconds to import.

    Raises:
        ModelError: what is wrong with the model directory or with `engine`.
    """
    config = ModelConfig.load(engine.model, engine.max_model_len)
    check_layout(config, engine.tp, engine.pp)
    _check_option("load_format", engine.load_format, LOAD_FORMATS)
    if engine.load_format == "auto":
        check_weights(engine.model, engine.tp, engine.pp, engine.rank)
    _check_option("dtype", engine.dtype_name, DTYPES)
    _check_option("quantization", engine.quantization, QUANTIZATIONS)
    return config


def _check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ModelError("INVALID_LAYOUT", f"{name} {value} is not one of {', '.join(filter(None, allowed))}")
