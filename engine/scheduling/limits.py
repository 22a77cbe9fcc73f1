"""The sizes that the scheduler works with: KV cache, running batch, step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The sizes of the KV cache, the running batch and a step.

    Args:
        vocab_size: number of token ids.
        max_model_len: tokens of the longest sequence, prompt and output together.
        eos_token_ids: the model's end-of-sequence tokens.
        kv_blocks: KV blocks in the pool; enough for at least one sequence of `max_model_len` tokens.
        block_size: tokens per KV block.
        max_batch_tokens: tokens of one step, over all sequences.
        max_running: sequences that have a slot at the same time.
        window: keys that a query sees, its own included: the largest window of all layers. None if a layer
            has no window.
        prefix_cache: whether full blocks are cached under their hash.
        max_prefill_tokens: prompt tokens in a step that also decodes; 0 lets `budget` choose.
        weight_tokens: the number of tokens whose computation takes as long as reading the weights once.
            `budget` sizes prompt chunks by it.
        async_scheduling: whether a step is planned while the step before it still runs.

    Raises:
        ValueError: `kv_blocks` cannot hold one sequence.
    """

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    kv_blocks: int = 1024
    block_size: int = 16
    max_batch_tokens: int = 512
    max_running: int = 64
    window: int | None = None
    prefix_cache: bool = True
    max_prefill_tokens: int = 0
    weight_tokens: int = 16
    async_scheduling: bool = False

    def __post_init__(self) -> None:
        if self.kv_blocks < self.blocks_per_sequence:
            raise ValueError(
                f"{self.kv_blocks} KV blocks of {self.block_size} cannot hold {self.max_model_len} tokens"
            )

    @property
    def blocks_per_sequence(self) -> int:
        """The largest number of blocks that one sequence references at once."""
        in_flight = self.max_batch_tokens * (2 if self.async_scheduling else 1)
        return blocks_per_sequence(self.max_model_len, self.window, in_flight, self.block_size)


def blocks_per_sequence(length: int, window: int | None, in_flight: int, block_size: int) -> int:
    """The largest number of blocks that a sequence references at once.

    Args:
        length: tokens of the sequence.
        window: as in `Limits`.
        in_flight: how many of its tokens the plans in flight may compute together.
        block_size: tokens per block.
    """
    blocks = -(-length // block_size)
    if window is None:
        return blocks
    # One block more, because the window may begin with the last token of a block.
    return min(blocks, -(-(window + in_flight) // block_size) + 1)
