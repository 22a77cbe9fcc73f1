"""Tiny random models with a byte-level tokeniser, as ordinary Hugging Face directories."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Engine processes set this before torch first computes.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

VOCABULARY = 320
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

MakeModel = Callable[..., Path]


def save_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = "the phalanx closes its ranks when a soldier falls and the shield wall stands again "
    tokenizer.train_from_iterator([words * 20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Writes a model directory; `family` is a name of transformers, other arguments go to its configuration.

    Logits are steep, so that ties are unlikely. Norms and biases are random too: with their initial values,
    the engine could leave them out and no test would fail.
    """
    import torch
    import transformers

    def make(*, family: str = "Llama", shards: int = 1, fused: bool = False, **overrides: Any) -> Path:
        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "initializer_range": 0.35,
            "eos_token_id": 0,
            "bos_token_id": None,
        }
        config = getattr(transformers, f"{family}Config")(**{**shape, **overrides})
        torch.manual_seed(7)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith(".bias"):
                    parameter.normal_(0, 0.3)
        directory = tmp_path_factory.mktemp("model")
        size = sum(p.numel() * p.itemsize for p in model.parameters())
        limit = int(size / (shards - 0.5)) if shards > 1 else "1GB"
        model.save_pretrained(directory, max_shard_size=limit, save_original_format=not fused)
        save_tokenizer(directory)
        generation = directory / "generation_config.json"
        generation.write_text(json.dumps({"eos_token_id": 0}))
        return directory

    return make


@pytest.fixture(scope="session")
def model_dir(make_model: MakeModel) -> Path:
    """The model that most tests share: 8 query heads over 4 KV heads, 4 layers."""
    return make_model()
