from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from engine.weights.model_config import ModelConfig
from engine.weights.safetensors_header import write_header
from engine.weights.tensors import tensor_shapes
from phalanx.cli.main import main


def tiny(directory: Path) -> Path:
    """A model of zeros."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {**tensor_shapes(ModelConfig.load(directory)), "spare": (2,)}
    file = directory / "model.safetensors"
    write_header(file, [(name, "BF16", shape) for name, shape in shapes.items()])
    with file.open("ab") as data:
        data.truncate(data.tell() + 32768)
    return directory


def test_a_model_is_sharded_and_both_pass_the_check(tmp_path: Path) -> None:
    model, sharded = tiny(tmp_path / "model"), tmp_path / "sharded"
    result = CliRunner().invoke(main, ["shard-model", str(model), str(sharded), "--tp", "2", "--pp", "2"])
    assert result.exit_code == 0, result.output
    assert "pp1_tp1.safetensors" in result.stdout
    for directory in (model, sharded):
        result = CliRunner().invoke(main, ["check-model", str(directory), "--check-nan"])
        assert result.exit_code == 0, result.output
        assert "can be served" in result.stdout
    assert "spare is no part" in CliRunner().invoke(main, ["check-model", str(model)]).stderr


def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    result = CliRunner().invoke(main, ["shard-model", str(model), str(tmp_path / "out"), "--tp", "3"])
    assert (result.exit_code, result.stderr) == (1, "phalanx: TP 3 does not divide the 4 attention heads\n")
    (model / "model.safetensors").write_bytes(b"")
    result = CliRunner().invoke(main, ["check-model", str(model)])
    assert result.exit_code == 1
    assert "cut short" in result.stderr
