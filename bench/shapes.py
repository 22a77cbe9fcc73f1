"""the model shapes that are measured, their work per token, and random checkpoints of them

A checkpoint is an ordinary Hugging Face directory of a Llama, with random weights from a seed. Speed depends
on the shape alone. Example: python -m bench.shapes 135m
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(".phalanx/bench")
POSITIONS = 8192
SHARD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tied: bool

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of the matrices of all layers."""
        kv = self.kv_heads * self.head_dim
        attention = self.hidden * (2 * self.hidden + 2 * kv)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def head_parameters(self) -> int:
        """Parameters of the LM head. With `tied`, the embedding is the same matrix."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters in memory, norms aside."""
        return self.layer_parameters + self.head_parameters * (1 if self.tied else 2)

    @property
    def step_parameters(self) -> int:
        """Parameters that a decode step reads: layers and LM head; of an embedding, only some rows."""
        return self.layer_parameters + self.head_parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV memory per token, with 16-bit keys and values."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def prefill_flops(self, lengths: Sequence[int]) -> int:
        """Floating-point operations for prompts of these lengths, with the logits of their last tokens.

        The sum of 2 x layer parameters x tokens, 2 x head parameters x prompts, and for causal attention, per
        layer, 2 products of 2 x heads x head size x length^2 / 2.
        """
        attention = sum(2 * self.layers * self.hidden * length * length for length in lengths)
        return 2 * self.layer_parameters * sum(lengths) + 2 * self.head_parameters * len(lengths) + attention

    def decode_flops(self, lengths: Sequence[int]) -> int:
        """Floating-point operations of one decode step for sequences of these lengths."""
        attention = sum(4 * self.layers * self.hidden * length for length in lengths)
        return 2 * self.step_parameters * len(lengths) + attention


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 2, 4, 2, 128, 512, tied=True),
        Shape("135m", 576, 30, 9, 3, 1536, 49152, tied=True),
        Shape("1.1b", 2048, 22, 32, 4, 5632, 32000, tied=False),
    )
}


def config_json(shape: Shape) -> dict[str, object]:
    """The contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": POSITIONS,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor by its name in transformers; matrices are [out, in]."""
    hidden, kv = shape.hidden, shape.kv_heads * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.tied:
        tensors["lm_head.weight"] = (shape.vocab, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": (shape.mlp, hidden),
            f"{prefix}mlp.up_proj.weight": (shape.mlp, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, shape.mlp),
        }
    return tensors


def checkpoint(shape: Shape, cache: Path = CACHE, seed: int = 0) -> Path:
    """The folder of the shape's bfloat16 checkpoint; writes it on first use."""
    folder = cache / shape.name
    if folder.exists():
        return folder
    import torch
    from safetensors.torch import save_file

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    files = _files(tensor_shapes(shape))
    index: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        values = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.randn(size, generator=generator).mul_(0.02).bfloat16()
            for name, size in tensors.items()
        }
        save_file(values, partial / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    total = sum(2 * math.prod(size) for tensors in files for size in tensors.values())
    contents: dict[str, object] = {
        "config.json": config_json(shape),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": index},
    }
    for name, content in contents.items():
        (partial / name).write_text(json.dumps(content, indent=2) + "\n")
    partial.rename(folder)
    return folder


def _files(tensors: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """Tensors in files of about SHARD_BYTES each."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, sizes in tensors.items():
        size += 2 * math.prod(sizes)
        if size > SHARD_BYTES and files[-1]:
            files.append({})
            size = 2 * math.prod(sizes)
        files[-1][name] = sizes
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    for name in options.shapes:
        shape = SHAPES[name]
        print(f"{checkpoint(shape, options.cache)}: {shape.parameters / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
