"""Experts that are stored as one tensor per layer, as transformers 5 holds them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from engine.weights.model_config import ModelConfig
from engine.weights.safetensors_header import ITEM_SIZES, StoredTensor

_FUSED = re.compile(r"(model\.layers\.\d+\.)mlp\.(gate\.weight|experts\.(gate_up_proj|down_proj))")


def split_fused_experts(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Replace fused tensors by one tensor per expert and matrix, under the names of published checkpoints.

    `experts.gate_up_proj` is [experts, 2 F, D], gate over up. `experts.down_proj` is [experts, D, F].
    """
    split: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        match = _FUSED.fullmatch(name)
        layer = int(name.split(".")[2]) if match else -1
        moe = config.layers[layer].moe if 0 <= layer < config.num_layers else None
        if match is None or moe is None:
            split[name] = tensor
            continue
        prefix = f"{match[1]}{moe.block_name}."
        if match[3] is None:
            split[f"{prefix}gate.weight"] = tensor
            continue
        names = [moe.down_name] if match[3] == "down_proj" else [moe.gate_name, moe.up_name]
        if len(tensor.shape) != 3 or tensor.shape[1] % len(names):
            split[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        rows //= len(names)
        size = rows * columns * ITEM_SIZES.get(tensor.dtype, 0)
        for index in range(experts * len(names)):
            part = replace(tensor, shape=(rows, columns), offset=tensor.offset + index * size)
            split[f"{prefix}experts.{index // len(names)}.{names[index % len(names)]}.weight"] = part
    return split
