"""Rotary position embedding (RoPE): cosines and sines for every kind of scaling that models use."""

from __future__ import annotations

import math

import torch

from engine.weights.rope_config import RopeConfig


def rope_tables(rope: RopeConfig, head_dim: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position and frequency, each [positions, head_dim / 2] in float32."""
    angles = torch.arange(positions).float()[:, None] * frequencies(rope, head_dim)[None, :]
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position, [head_dim / 2] in float32, computed in the order of transformers."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    match rope.kind:
        case "longrope":
            return 1.0 / (torch.tensor(rope.factors) * rope.theta**exponents)
        case "yarn":
            return _yarn(rope, rope.theta**exponents)
    inverse = 1.0 / (rope.theta**exponents)
    match rope.kind:
        case "linear":
            return inverse / rope.factor
        case "llama3":
            return _llama3(rope, inverse)
    return inverse  # "dynamic" equals the default up to max_position_embeddings; longer ones are refused


def _llama3(rope: RopeConfig, inverse: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: stretch long wavelengths by `factor`, keep short ones, interpolate between them."""
    wavelength = 2 * math.pi / inverse
    longest = rope.original_max_position / rope.low_freq_factor
    shortest = rope.original_max_position / rope.high_freq_factor
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - blend) * inverse / rope.factor + blend * inverse
    stretched = torch.where(wavelength > longest, inverse / rope.factor, inverse)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, stretched)


def _yarn(rope: RopeConfig, wavelengths: torch.Tensor) -> torch.Tensor:
    """YaRN (Peng et al. 2023): keep high frequencies, stretch low ones by `factor`, with a ramp between."""
    half = wavelengths.shape[0]

    def index_of(rotations: float) -> float:
        """The index of the frequency that makes this many rotations in the original length."""
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return 2 * half * math.log(turns) / (2 * math.log(rope.theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001  # as in transformers, against a division by zero
    stretched = ((torch.arange(half).float() - low) / (high - low)).clamp(0, 1)
    unchanged = 1 - stretched
    return 1.0 / (rope.factor * wavelengths) * (1 - unchanged) + 1.0 / wavelengths * unchanged
