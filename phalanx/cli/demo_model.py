"""`phalanx demo-model`: trains a small language model on this machine's Python standard library."""

from __future__ import annotations

import json
import random
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phalanx.cli.failure import Failure

if TYPE_CHECKING:
    from phalanx.cli.demo_llama import Shape
    from phalanx.cli.demo_training import Progress

END = "<|end|>"
# Corpus size per second of training. Two cores train on fewer characters, so few texts are used twice.
CHARS_PER_S = 40_000
_TOKENIZER_CHARS = 1_000_000
_SAVE_S = 1.5  # reserved for writing the files
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "lib2to3", "encodings", "pydoc_data"}
_MAX_DIGITS = 0.1  # a file with a larger share of digits is a table, not code
_PARTIAL = ".partial"
_CHAT_TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:\n{% endif %}"
)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--seconds",
    type=click.FloatRange(min=5),
    default=75.0,
    show_default=True,
    help="Time for everything, from reading to writing.",
)
@click.option("--seed", type=int, default=0, show_default=True)
def demo_model(out: Path, seconds: float, seed: int) -> None:
    """Train a small Llama on this Python's standard library and write it to OUT.

    OUT is an ordinary Hugging Face model directory. The default time suits two cores.
    """
    deadline = time.monotonic() + seconds
    if out.exists():
        raise Failure(f"{out} exists already")
    from rich import progress as rich

    columns = (rich.TextColumn("training"), rich.BarColumn(), rich.TextColumn("{task.fields[state]}"))
    with rich.Progress(*columns, rich.TimeRemainingColumn(compact=True)) as bar:
        task = bar.add_task("", total=1.0, state="reading the standard library")

        def report(progress: Progress) -> None:
            state = f"loss {progress.loss:.2f}  {progress.tokens_per_s / 1000:.1f}k tokens/s"
            bar.update(task, completed=progress.fraction, state=state)

        loss, parameters = make(out, deadline, seed, report)
        bar.update(task, completed=1.0)
    click.echo(f"wrote {out}: {parameters / 1e6:.1f}M parameters, loss {loss:.2f} nats per token")


def make(out: Path, deadline: float, seed: int, report: Callable[[Progress], None]) -> tuple[float, int]:
    """Train until `deadline`, a time of time.monotonic, and write a model directory atomically.

    Returns the last loss in nats per token and the number of parameters.
    """
    import torch

    from phalanx.cli.demo_llama import Shape
    from phalanx.cli.demo_training import train

    shape = Shape()
    texts = _head(corpus(seed), int(CHARS_PER_S * (deadline - time.monotonic())))
    tokenizer = _tokenizer(texts, shape.vocab)
    ids: list[int] = []
    end = tokenizer.token_to_id(END)
    for encoding in tokenizer.encode_batch_fast(texts):
        ids += [*encoding.ids, end]
    model, loss = train(shape, torch.tensor(ids), deadline - _SAVE_S, seed, report)
    partial = out.with_name(out.name + _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write(partial, shape, tokenizer, model.state_dict())
    partial.rename(out)
    return loss, sum(weight.numel() for weight in model.parameters())


def corpus(seed: int) -> Iterator[str]:
    """Source files of the standard library in random order, by `seed`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p for p in library.rglob("*.py") if not _SKIPPED & set(p.relative_to(library).parts))
    random.Random(seed).shuffle(paths)
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore")
        if sum(map(text.count, "0123456789")) < _MAX_DIGITS * len(text):
            yield text


def _tokenizer(texts: list[str], vocab: int) -> Any:
    """A byte-level BPE tokeniser for code: `def ` or a line break with its indent can be one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\w+ ?|[^\w\s]+ ?|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_head(texts, _TOKENIZER_CHARS), trainer)
    return tokenizer


def _head(texts: Iterable[str], chars: int) -> list[str]:
    """The first texts that together have at least `chars` characters, or all texts."""
    taken: list[str] = []
    for text in texts:
        if chars <= 0:
            break
        taken.append(text)
        chars -= len(text)
    return taken


def _write(folder: Path, shape: Shape, tokenizer: Any, weights: dict[str, Any]) -> None:
    """Write an ordinary Hugging Face model directory."""
    from safetensors.torch import save_file

    end = tokenizer.token_to_id(END)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float32",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.positions,
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    generation = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    special = {"bos_token": END, "eos_token": END, "pad_token": END}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
        ("special_tokens_map.json", special),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
