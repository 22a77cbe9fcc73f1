"""How many KV blocks a rank has, and how long a sequence may be. Pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import BLOCK_SIZE, EngineConfig
from engine.errors import ModelError
from engine.grid import Grid
from engine.scheduling.limits import blocks_per_sequence
from engine.weights.model_config import ModelConfig
from engine.weights.stages import stage_layers

_CPU_KV_BYTES = 1 << 30
_SHARE_OF_FREE_GPU_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class KVSize:
    """The KV blocks of every rank of a replica, and the tokens of the longest sequence."""

    num_blocks: int
    max_model_len: int


def kv_memory_bytes(engine: EngineConfig, ranks_on_device: int, free_gpu_bytes: int) -> int:
    """KV memory of one rank. `ranks_on_device` ranks of the replica share its GPU, itself included."""
    if engine.kv_bytes:
        return engine.kv_bytes
    if engine.device == "cpu":
        return _CPU_KV_BYTES
    return int(free_gpu_bytes * _SHARE_OF_FREE_GPU_MEMORY) // ranks_on_device


def kv_heads_per_rank(config: ModelConfig, tp: int) -> int:
    """KV heads of one rank; with more ranks than heads, several ranks have a copy of the same head."""
    return max(1, config.num_kv_heads // tp)


def block_bytes(config: ModelConfig, tp: int, pp: int, bytes_per_value: int) -> int:
    """Bytes of one KV block on the rank with the most layers. All ranks must have equally many blocks."""
    layers = max(len(stage_layers(config, Grid(tp, pp, rank))) for rank in range(tp * pp))
    values_per_token = 2 * layers * kv_heads_per_rank(config, tp) * config.head_dim  # keys and values
    return values_per_token * bytes_per_value * BLOCK_SIZE


def size_kv_cache(
    engine: EngineConfig, config: ModelConfig, max_blocks: int, tokens_in_flight: int
) -> KVSize:
    """Choose the size of the cache. Without `engine.max_model_len`, a sequence may be as long as fits.

    Args:
        engine: its max_model_len and max_running count.
        config: the model.
        max_blocks: how many blocks fit into memory.
        tokens_in_flight: the maximum number of tokens that one sequence has in unfinished steps.

    Raises:
        ModelError: INVALID_LAYOUT, if max_model_len exceeds the model's positions or the memory.
    """
    max_model_len = engine.max_model_len or config.max_position
    if max_model_len > config.max_position:
        why = ""
        if config.rope.kind == "dynamic":
            why = "; beyond them dynamic RoPE depends on the sequence's length, and a replay is not exact"
        raise ModelError(
            "INVALID_LAYOUT",
            f"max_model_len {max_model_len} exceeds the model's {config.max_position} positions{why}",
        )
    needed = blocks_per_sequence(max_model_len, config.kv_window, tokens_in_flight, BLOCK_SIZE)
    if max_blocks < needed:
        if engine.max_model_len or max_blocks == 0:
            raise ModelError(
                "INVALID_LAYOUT",
                f"the KV memory holds {max_blocks * BLOCK_SIZE} tokens, "
                f"fewer than max_model_len {max_model_len}",
            )
        max_model_len, needed = max_blocks * BLOCK_SIZE, max_blocks
    return KVSize(min(max_blocks, needed * engine.max_running), max_model_len)
