from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.processes.config_check import load_config
from tests.unit.engine.processes.llama import LLAMA


@pytest.fixture
def directory(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp": 3}, "TP 3"),
        ({"pp": 5}, "PP 5"),
        ({"load_format": "gguf"}, "load_format gguf is not one of auto, dummy"),
        ({"dtype": "int3"}, "dtype int3 is not one of float32, bfloat16, float16"),
        ({"quantization": "int3"}, "quantization int3 is not one of int8, int4, fp8"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_by_name(
    directory: str, fields: dict[str, object], message: str
) -> None:
    options = {"load_format": "dummy", **fields}
    with pytest.raises(ModelError, match=message) as caught:
        load_config(EngineConfig(directory, **options))  # type: ignore[arg-type]
    assert caught.value.reason == "INVALID_LAYOUT"


def test_weights_are_looked_for_only_where_they_are_read(directory: str) -> None:
    assert load_config(EngineConfig(directory, load_format="dummy")).num_layers == LLAMA["num_hidden_layers"]
    with pytest.raises(ModelError) as caught:
        load_config(EngineConfig(directory))
    assert caught.value.reason == "INVALID_MODEL"
