from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import BLOCK_SIZE, EngineConfig
from engine.errors import ModelError
from engine.processes.kv_sizing import KVSize, block_bytes, kv_heads_per_rank, kv_memory_bytes, size_kv_cache
from engine.weights.model_config import ModelConfig
from tests.unit.engine.processes.llama import LLAMA


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory: Path = tmp_path_factory.mktemp("llama")
    (directory / "config.json").write_text(json.dumps(LLAMA))
    return ModelConfig.load(directory)


def test_ranks_that_share_a_gpu_share_its_memory() -> None:
    config = EngineConfig("", device="cuda:0")
    assert [kv_memory_bytes(config, ranks, 1000) for ranks in (1, 2, 3)] == [900, 450, 300]


def test_memory_that_is_given_is_taken_as_it_is() -> None:
    for device in ("cpu", "cuda:0"):
        assert kv_memory_bytes(EngineConfig("", device=device, kv_bytes=77), 2, 1000) == 77


def test_a_block_has_keys_and_values_of_the_fullest_stage(llama: ModelConfig) -> None:
    whole = 2 * 4 * 2 * 16 * 4 * BLOCK_SIZE  # K and V, layers, KV heads, head size, bytes
    assert block_bytes(llama, 1, 1, 4) == whole
    assert block_bytes(llama, 2, 1, 4) == whole // 2
    assert block_bytes(llama, 4, 1, 4) == whole // 2, "heads are copied where there are more ranks"
    assert block_bytes(llama, 1, 3, 4) == whole // 2, "the fullest of three stages has two of four layers"
    assert [kv_heads_per_rank(llama, tp) for tp in (1, 2, 4)] == [2, 1, 1]


def test_a_sequence_is_as_long_as_fits_unless_a_length_is_asked_for(llama: ModelConfig) -> None:
    whole = 512 // BLOCK_SIZE
    assert size_kv_cache(EngineConfig(""), llama, whole, 512) == KVSize(whole, 512)
    assert size_kv_cache(EngineConfig(""), llama, 5, 512) == KVSize(5, 5 * BLOCK_SIZE)
    with pytest.raises(ModelError, match="fewer than max_model_len 96"):
        size_kv_cache(EngineConfig("", max_model_len=96), llama, 5, 512)
    with pytest.raises(ModelError, match="holds 0 tokens"):
        size_kv_cache(EngineConfig(""), llama, 0, 512)
    with pytest.raises(ModelError, match="exceeds the model's 512 positions"):
        size_kv_cache(EngineConfig("", max_model_len=513), llama, 1000, 512)


@given(st.integers(1, 2000), st.integers(1, 8), st.integers(0, 512))
def test_no_more_blocks_than_fit_or_than_running_sequences_can_use(
    llama: ModelConfig, max_blocks: int, max_running: int, max_model_len: int
) -> None:
    engine = EngineConfig("", max_running=max_running, max_model_len=max_model_len)
    try:
        size = size_kv_cache(engine, llama, max_blocks, 512)
    except ModelError:
        assert max_model_len > max_blocks * BLOCK_SIZE
        return
    one = -(-size.max_model_len // BLOCK_SIZE)
    assert one <= size.num_blocks == min(max_blocks, one * max_running)
    assert max_model_len in (0, size.max_model_len)
