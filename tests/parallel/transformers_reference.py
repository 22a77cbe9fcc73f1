"""Log-probabilities of transformers: in float64 the truth, in float32 the yardstick for rounding errors."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch


@functools.cache
def logprobs(model: Path, token_ids: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities of the next token at every position, [positions, vocabulary], without a cache."""
    with torch.inference_mode():
        return _load(model, dtype)(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)


@functools.cache
def _load(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    # The default implementation of experts has no float64.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager")
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):  # transformers computes norms in float32
                module.forward = functools.partial(_rms_norm, module)
    return model


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return module.weight * (x * torch.rsqrt(mean_square + module.variance_epsilon))
