"""The requests of a warm-up: prompts and batches of every size for which a GPU compiles a kernel. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from engine.request import Request, SamplingParams


def warm_up_requests(
    max_sequences: int, max_prompt_len: int, max_batch_tokens: int
) -> Iterator[list[Request]]:
    """Batches of requests. The caller runs each batch to its end before it takes the next.

    Kernels are compiled for powers of two, so there is one prompt and one batch for each power of two, one of
    the maximum, and one batch of long prompts that fills a step.
    """
    batches = [(1, length) for length in _sizes(max_prompt_len)]
    batches += [(size, 1) for size in _sizes(max_sequences)]
    batches.append((min(max_sequences, -(-max_batch_tokens // max_prompt_len)), max_prompt_len))
    for batch, (size, length) in enumerate(batches):
        requests = []
        for number in range(size):
            # Long prompts start with different tokens, else they would be found in the prefix cache.
            prompt = (batch + number if length > 1 else 0, *[0] * (length - 1))
            name, sampling = f"warm-up {batch} {number}", SamplingParams(1.0, seed=0)
            requests.append(Request(name, prompt, sampling, max_tokens=2, ignore_eos=True))
        yield requests


def _sizes(maximum: int) -> list[int]:
    return sorted({1 << power for power in range(maximum.bit_length())} | {maximum})
