from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelError
from engine.weights.architectures import ARCHITECTURES
from engine.weights.identity import model_hash
from engine.weights.locate import check_weights
from engine.weights.model_config import ModelConfig, check_layout
from engine.weights.rope_config import RopeConfig
from engine.weights.tensors import tensor_shapes

RAW: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


def load(directory: Path, generation: dict[str, Any] | None = None, **overrides: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps({**RAW, **overrides}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.load(directory)


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> None:
    """A safetensors file of zeros, by the format's definition."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(end))


def refused(directory: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        check_weights(directory)
    assert caught.value.reason == "INVALID_MODEL"
    return caught.value


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A directory with every tensor in one file."""
    write_weights(tmp_path / "model.safetensors", tensor_shapes(load(tmp_path)))
    return tmp_path


def test_shapes_are_read(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 2, 2)
    assert config.eos_token_ids == (2,)
    assert not config.tied_embeddings


def test_the_end_of_sequence_is_that_of_the_generation_config(tmp_path: Path) -> None:
    assert load(tmp_path, {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({}, RopeConfig()),
        ({"rope_theta": 5e5}, RopeConfig(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, RopeConfig(7.0)),
        (
            {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2}},
            RopeConfig(9.0, "linear", 2.0),
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64),
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            RopeConfig(1e4, "dynamic", 2.0, original_max_position=2048),
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 32}},
            RopeConfig(1e4, "yarn", 1.0, original_max_position=32),
        ),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1, 2],
                    "long_factor": [3, 4],
                    "factor": 1,
                }
            },
            RopeConfig(1e4, "longrope", 1.0, original_max_position=2048, factors=(1.0, 2.0)),
        ),
    ],
    ids=["none", "theta", "parameters", "scaling", "llama3", "dynamic", "yarn", "longrope"],
)
def test_both_spellings_of_rope_are_read(tmp_path: Path, fields: dict[str, Any], rope: RopeConfig) -> None:
    assert load(tmp_path, **fields).rope == rope


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            f"MambaForCausalLM is not supported; known: {', '.join(ARCHITECTURES)}",
        ),
        ({"architectures": None}, "known: LlamaForCausalLM"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope type mrope is not supported; known: default"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": None}, "hidden_size|NoneType"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_attention_heads": 0, "head_dim": 2}, "num_heads 0 must be at least 1"),
        ({"num_hidden_layers": -1}, "num_layers -1 must be at least 1"),
        ({"vocab_size": float("inf")}, "OverflowError"),
        ({"rope_scaling": ["linear"]}, "AttributeError"),
    ],
    ids=[
        "architecture", "no architecture", "mrope", "part of a head", "incomplete rope", "activation",
        "quantised", "null",
        "no heads", "no heads of a size", "negative", "infinite", "rope is a list",
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(tmp_path, **fields)
    assert caught.value.reason == "INVALID_MODEL"


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (8, 3)])
def test_layouts_that_divide_the_model(tmp_path: Path, tp: int, pp: int) -> None:
    check_layout(load(tmp_path), tp, pp)


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [
        (3, 1, "TP 3 does not divide the 8 attention heads"),
        (1, 4, "PP 4 is more than the 3 layers"),
        (0, 1, "at least 1"),
        (16, 1, "does not divide"),
    ],
)
def test_layouts_that_do_not_divide_the_model(tmp_path: Path, tp: int, pp: int, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        check_layout(load(tmp_path), tp, pp)
    assert caught.value.reason == "INVALID_LAYOUT"


def test_kv_heads_and_mlp_must_divide_too(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="3 KV heads"):
        check_layout(load(tmp_path, num_attention_heads=6, num_key_value_heads=3, head_dim=4), 2, 1)
    with pytest.raises(ModelError, match="MLP size 25"):
        check_layout(load(tmp_path, intermediate_size=25), 2, 1)
    with pytest.raises(ModelError, match="odd share of the MLP size 50"):
        check_layout(load(tmp_path, intermediate_size=50), 2, 1)


def test_a_whole_checkpoint_passes(whole: Path) -> None:
    check_weights(whole)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    load(tmp_path)
    assert "no weights" in refused(tmp_path).message


def test_a_shard_that_the_index_names_must_be_there(whole: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}
    (whole / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks other.safetensors" in refused(whole).message


def test_a_missing_tensor_is_named(whole: Path) -> None:
    shapes = tensor_shapes(ModelConfig.load(whole))
    del shapes["model.layers.1.mlp.up_proj.weight"]
    write_weights(whole / "model.safetensors", shapes)
    assert "has no tensor model.layers.1.mlp.up_proj.weight" in refused(whole).message


def test_a_tensor_of_another_shape_is_named(whole: Path) -> None:
    shapes = tensor_shapes(ModelConfig.load(whole)) | {"model.norm.weight": (17,)}
    write_weights(whole / "model.safetensors", shapes)
    assert "model.norm.weight" in refused(whole).message
    assert "[17], expected [16]" in refused(whole).message


def test_a_tensor_of_another_type_is_named(whole: Path) -> None:
    write_weights(whole / "model.safetensors", tensor_shapes(ModelConfig.load(whole)), dtype="I32")
    assert "dtype I32" in refused(whole).message


def test_biases_belong_to_the_model_only_where_its_config_says_so(tmp_path: Path) -> None:
    plain = tensor_shapes(load(tmp_path))
    biased = tensor_shapes(load(tmp_path, attention_bias=True, mlp_bias=True))
    assert {name for name in biased if name.endswith(".bias")} == set(biased) - set(plain)
    assert biased["model.layers.0.self_attn.k_proj.bias"] == (4,)


@pytest.mark.parametrize("keep", [4, 40, -1])
def test_a_file_cut_short_is_refused(whole: Path, keep: int) -> None:
    path = whole / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "cut short" in refused(whole).message


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
    ],
    ids=["list", "number", "no offsets", "no shape", "texts"],
)
def test_a_header_that_describes_no_tensors_is_refused(whole: Path, header: object) -> None:
    head = json.dumps(header).encode()
    (whole / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(64))
    assert "is not a safetensors file" in refused(whole).message


def test_the_hash_follows_weights_and_configuration(whole: Path) -> None:
    first = model_hash(whole)
    path = whole / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    second = model_hash(whole)
    load(whole, rms_norm_eps=1e-6)
    assert len({first, second, model_hash(whole)}) == 3
    assert model_hash(whole) == model_hash(whole)
