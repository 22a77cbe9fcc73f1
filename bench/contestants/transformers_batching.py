"""transformers' own continuous batching, as a contestant."""

from __future__ import annotations

from dataclasses import fields

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from bench.contestants.transformers_generate import load
from bench.protocol import Recorder, Setup, Trace, Work, serve

PAGE_TOKENS = 32
_NAMES = {field.name for field in fields(ContinuousBatchingConfig)}
_PAGE = "page_size" if "page_size" in _NAMES else "block_size"  # as transformers 5.17 calls it
DEFAULT_BATCH_TOKENS = 512


class ContinuousBatching:
    """`continuous_batching_context_manager`, as `generate_batch` uses it, but with a length per request.

    One mask covers all queries and all keys of a step. So the cost of a step grows with the product of their
    numbers, and more sequences per step are not always faster.
    """

    name = "transformers continuous batching"

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._model = load(setup, attn_implementation="sdpa")
        self._running = setup.max_running
        self._batch_tokens = setup.max_batch_tokens or DEFAULT_BATCH_TOKENS
        self.details = (
            f"transformers {transformers.__version__}, torch {torch.__version__}, {setup.dtype}, "
            f"at most {self._running} sequences and {self._batch_tokens} tokens in a step"
        )

    def run(self, work: Work) -> Trace:
        """Submit all prompts at once; the manager stamps every token with the time of its arrival.

        Raises:
            ValueError: some prompts are to arrive late, which this contestant does not support.
            RuntimeError: a request failed.
        """
        if work.late:
            raise ValueError("only prompts that are there from the start")
        lengths = [len(prompt) + new for prompt, new in zip(work.prompts, work.new_tokens, strict=True)]
        pages = sum(sorted(-(-length // PAGE_TOKENS) + 1 for length in lengths)[-self._running :])
        options = ContinuousBatchingConfig(
            **{_PAGE: PAGE_TOKENS},
            num_blocks=pages,
            max_batch_tokens=self._batch_tokens,
            max_requests_per_batch=self._running,
            allow_block_sharing=False,
        )
        hints = WorkloadHints(max(map(len, work.prompts)), max(work.new_tokens), len(work.prompts))
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=max(work.new_tokens))
        with self._model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=options, workload_hints=hints
        ) as manager:
            recorder = Recorder(work)
            for index in recorder.early:
                manager.add_request(
                    list(work.prompts[index]),
                    request_id=str(index),
                    max_new_tokens=work.new_tokens[index],
                    record_timestamps=True,
                    eos_token_id=-1,
                )
            stamped: list[tuple[float, int, int]] = []
            for _ in recorder.early:
                result = None
                while result is None:
                    result = manager.get_result(timeout=1)
                    if result is None and not manager.is_running():
                        raise RuntimeError("the generation thread has ended")
                if result.error is not None:
                    raise RuntimeError(f"request {result.request_id}: {result.error}")
                index = int(result.request_id)
                stamped += (
                    (at, index, token)
                    for at, token in zip(result.timestamps, result.generated_tokens, strict=True)
                )
        for at, index, token in sorted(stamped):
            recorder.tokens([(index, token)], at)
        return recorder.finish()


if __name__ == "__main__":
    serve(ContinuousBatching)
