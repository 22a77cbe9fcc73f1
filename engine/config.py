"""How one rank of an engine runs a model. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_SIZE = 16  # tokens per KV block
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("", "int8", "int4", "fp8")
LOAD_FORMATS = ("auto", "dummy")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one rank runs a model. The engine chooses a size that is zero, and a dtype that is empty."""

    model: str
    tp: int = 1
    pp: int = 1
    rank: int = 0
    epoch: int = 1
    host: str = "127.0.0.1"
    device: str = "cpu"
    dtype: str = ""
    max_model_len: int = 0
    max_batch_tokens: int = 0  # tokens per step, over all sequences
    max_running: int = 64  # sequences that have KV blocks at the same time
    # Prompt tokens in a step that also decodes; with 0, `engine/scheduling/budget.py` decides.
    max_prefill_tokens: int = 0
    prefix_cache: bool = True  # whether sequences with the same beginning share its KV
    # KV memory of one rank. With 0, a rank on a CPU takes 1 GiB, and a rank on a GPU takes 90 % of the free
    # memory divided by the number of the replica's ranks on that GPU. Set it where replicas share a GPU: they
    # do not know of each other.
    kv_bytes: int = 0
    threads: int = 0  # 0: OMP_NUM_THREADS, else the cores divided by the number of ranks
    # Of the weights: "int8" or "fp8" with a scale per row, "int4" with a scale per row and 64 columns.
    quantization: str = ""
    load_format: str = "auto"  # or "dummy": random weights from config.json alone
    check_weights: bool = False  # refuse weights that are NaN or infinite

    @property
    def batch_tokens(self) -> int:
        """Tokens per step. The default is larger on a GPU: it computes more tokens per weight read."""
        return self.max_batch_tokens or (512 if self.device == "cpu" else 2048)

    @property
    def dtype_name(self) -> str:
        """The dtype of weights and activations. The default depends on the device."""
        return self.dtype or ("float32" if self.device == "cpu" else "bfloat16")
