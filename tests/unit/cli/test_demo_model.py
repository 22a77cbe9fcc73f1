"""What `phalanx demo-model` writes is an ordinary Hugging Face model."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from phalanx.cli import demo_model
from phalanx.cli.demo_llama import Llama, Shape
from phalanx.cli.demo_training import Muon, Progress, _orthogonal, train
from phalanx.cli.main import main


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that had no time to train."""
    out = tmp_path_factory.mktemp("model") / "demo"
    demo_model.make(out, time.monotonic() + 2, 0, lambda progress: None)
    return out


def test_transformers_computes_what_was_trained(directory: Path):
    mine = Llama(Shape())
    mine.load_state_dict(load_file(directory / "model.safetensors"))
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.arange(2 * 50).view(2, 50) % Shape().vocab
    with torch.no_grad():
        torch.testing.assert_close(mine(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert theirs.dtype == torch.float32


def test_the_layout_allows_tp4_and_pp2():
    shape = Shape()
    assert shape.heads % 4 == shape.kv_heads % 4 == shape.mlp % 4 == shape.vocab % 4 == 0
    assert shape.layers % 2 == 0
    assert shape.heads >= 8
    assert shape.positions >= 1024


def test_the_tokeniser_spells_any_text(directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for text in ("def f(x):\n    return x\n", "naïve ⚔ 漢字\x00\ttab"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(demo_model.END)
    assert len(tokenizer) == Shape().vocab


def test_the_chat_template_asks_for_an_answer(directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "sort a list"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "# user: sort a list\n# assistant:\n"


def test_nothing_is_left_half_written(directory: Path):
    assert {path.name for path in directory.parent.iterdir()} == {directory.name}
    result = CliRunner().invoke(main, ["demo-model", str(directory)])
    assert result.exit_code == 1
    assert "exists already" in result.stderr


def test_training_lowers_the_loss_and_uses_its_time():
    shape = Shape(vocab=8, hidden=16, layers=2, heads=4, kv_heads=2, mlp=32, positions=256)
    data = torch.arange(4096) % 7
    reports: list[Progress] = []
    began = time.monotonic()
    _, loss = train(shape, data, began + 2, 0, reports.append)
    assert loss < reports[0].loss
    assert time.monotonic() >= began + 2
    assert all(a.fraction < b.fraction <= 1 for a, b in itertools.pairwise(reports))


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_muons_update_is_about_orthogonal(shape: tuple[int, ...]):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(_orthogonal(torch.randn(shape)))
    assert values.min() > 0.3
    assert values.max() < 1.4


def test_muon_descends():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    target = torch.randn(8, 8)
    first = (weight - target).square().sum()
    with ThreadPoolExecutor(1) as pool:
        muon = Muon([weight], 0.1, pool)
        for _ in range(100):
            weight.grad = 2 * (weight - target).detach()
            muon.step(1.0)
    assert (weight - target).square().sum() < first / 4
