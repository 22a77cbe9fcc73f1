"""The rotary embedding of a model, read from its config.json. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.weights.checkpoint import invalid_model

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `kind` is one of KINDS. Fields after `factor` are used by some kinds only.

    `attention_factor` scales cosine and sine. `factors` are longrope's divisors, one per frequency.

    Every kind is a fixed function of the position: a replay or a shared prefix needs the same keys as the
    first time. Two kinds differ from transformers for that reason. `dynamic` is served only up to the
    length where it would begin to depend on the sequence's length. `longrope` uses either its short or
    its long factors for all sequences, depending on the maximum length that is served.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()


def parse_rope(raw: Mapping[str, Any], default_theta: float, max_position: int, longest: int) -> RopeConfig:
    """Read `rope_parameters`, as transformers 5 writes it, or the older `rope_theta` and `rope_scaling`.

    Args:
        raw: config.json.
        default_theta: the architecture's, for a config.json without one.
        max_position: the model's maximum length of a sequence.
        longest: the maximum length that is served.

    Raises:
        ModelError: INVALID_MODEL.
    """
    values = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in KINDS or any(isinstance(value, dict) for value in values.values()):
        raise invalid_model(f"rope type {kind} is not supported; known: {', '.join(KINDS)}")
    if values.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise invalid_model("partial_rotary_factor is not supported: whole heads are rotated")
    theta = float(values.get("rope_theta", raw.get("rope_theta", default_theta)))
    if not math.isfinite(theta) or theta <= 0:
        raise invalid_model(f"rope_theta {theta} is not a positive number")
    # As in transformers: the field outside the rope parameters wins; without either, the model's own limit
    # counts.
    original = int(
        raw.get("original_max_position_embeddings")
        or values.get("original_max_position_embeddings")
        or max_position
    )
    match kind:
        case "linear":
            return RopeConfig(theta, kind, float(values["factor"]))
        case "dynamic":
            return RopeConfig(theta, kind, float(values["factor"]), original_max_position=max_position)
        case "llama3":
            return RopeConfig(
                theta,
                kind,
                float(values["factor"]),
                float(values["low_freq_factor"]),
                float(values["high_freq_factor"]),
                original,
            )
        case "yarn":
            factor = float(values.get("factor") or max_position / original)
            return RopeConfig(
                theta,
                kind,
                factor,
                original_max_position=original,
                attention_factor=_yarn_attention(values, factor),
                beta_fast=float(values.get("beta_fast") or 32),
                beta_slow=float(values.get("beta_slow") or 1),
                truncate=bool(values.get("truncate", True)),
            )
        case "longrope":
            factor = float(values.get("factor") or max_position / original)
            factors = values["long_factor" if longest > original else "short_factor"]
            return RopeConfig(
                theta,
                kind,
                factor,
                original_max_position=original,
                attention_factor=_longrope_attention(values, factor, original),
                factors=tuple(float(value) for value in factors),
            )
    return RopeConfig(theta)


def _yarn_attention(values: Mapping[str, Any], factor: float) -> float:
    """Peng et al. 2023, section 3.4. With DeepSeek's `mscale` fields: the ratio of two such scales."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    if values.get("mscale") and values.get("mscale_all_dim"):
        return scale(float(values["mscale"])) / scale(float(values["mscale_all_dim"]))
    return scale(1.0)


def _longrope_attention(values: Mapping[str, Any], factor: float, original: int) -> float:
    """Ding et al. 2024."""
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
