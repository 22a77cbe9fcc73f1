"""mixed traffic: requests of a real trace, sent at once, beside transformers' continuous batching and vLLM

Lengths are those of the trace divided by 8. Prompts are random tokens, the same for all contestants. vLLM and
Phalanx run up to --max-running sequences at once. Under SDPA, a step of transformers' continuous batching
costs the product of its queries and keys. So the bench first searches for its best numbers of sequences and
tokens per step.
Example: python -m bench.mixed --trace AzureLLMInferenceTrace_conv.csv --vllm-python ~/vllm/bin/python
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench import render, results
from bench.contest import ContestantError, Entry, contest
from bench.options import add_contest_options, slow_bfloat16, taking_part
from bench.protocol import Setup, Trace, Work
from bench.shapes import SHAPES, Shape, checkpoint
from bench.traffic import as_work, read_lengths

CONTESTANTS = ["phalanx", "transformers-batching", "vllm"]
IN_FLOAT32 = ["transformers-batching@float32", "vllm@float32"]
DIVISOR = 8
KV_BYTES = 2 << 30
TUNED = "transformers-batching"
TRIED_SEQUENCES, TRIED_TOKENS = (8, 16, 32, 64), (256, 512)


def tokens_per_s(work: Work, trace: Trace) -> float:
    """Tokens of prompts and outputs per second until the last one."""
    return (sum(map(len, work.prompts)) + sum(work.new_tokens)) / trace.events[-1][0]


def run(entry: Entry, setup: Setup, work: Work, options: argparse.Namespace) -> Trace:
    """Run one contestant: build it, warm it up with a few short requests, then do the work."""
    warm = as_work([(32, 4)] * 4, SHAPES["tiny"].vocab, "warm-up")
    logs = options.cache / "logs"
    with contest([entry], setup, options.vllm_python, logs, options.load_timeout) as (contestant,):
        contestant.run(warm, options.timeout)
        return contestant.run(work, options.timeout)


def tuned(entry: Entry, setup: Setup, work: Work, options: argparse.Namespace) -> Setup:
    """Try some numbers of sequences and tokens per step on the first requests; returns the fastest setup."""
    best, best_rate = setup, 0.0
    sample = Work(work.prompts[: options.tune_requests], work.new_tokens[: options.tune_requests])
    for sequences, tokens in itertools.product(TRIED_SEQUENCES, TRIED_TOKENS):
        tried = replace(setup, max_running=sequences, max_batch_tokens=tokens)
        rate = tokens_per_s(sample, run(entry, tried, sample, options))
        print(f"    {sequences} sequences, {tokens} tokens: {rate:.0f} tokens/s", flush=True)
        if rate > best_rate:
            best, best_rate = tried, rate
    return best


def measure(shape: Shape, work: Work, options: argparse.Namespace) -> Iterator[results.Row]:
    """Measure all contestants on one shape, one after the other."""
    longest = max(len(prompt) + new for prompt, new in zip(work.prompts, work.new_tokens, strict=True))
    setup = Setup(
        str(checkpoint(shape, options.cache).absolute()),
        threads=options.threads,
        max_model_len=max(longest, 512),
        kv_bytes=KV_BYTES,
        max_running=options.max_running,
        max_batch_tokens=options.max_batch_tokens,
    )
    for entry in taking_part(options):
        own = setup
        if entry.kind == TUNED and options.tune_requests:
            own = tuned(entry, setup, work, options)
        trace = run(entry, own, work, options)
        rate, seconds = tokens_per_s(work, trace), trace.events[-1][0]
        print(f"  {entry!s:<22} {rate:8.0f} tokens/s, {seconds:.1f} s", flush=True)
        yield {
            "shape": shape.name,
            "contestant": str(entry),
            "requests": len(work.prompts),
            "prompt_tokens": sum(map(len, work.prompts)),
            "output_tokens": sum(work.new_tokens),
            "tokens_per_s": rate,
            "output_tokens_per_s": sum(work.new_tokens) / seconds,
            "seconds": seconds,
            "max_running": own.max_running,
            "max_batch_tokens": own.max_batch_tokens,
        }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_contest_options(parser, CONTESTANTS + slow_bfloat16(IN_FLOAT32), ["135m"])
    parser.add_argument("--trace", type=Path, required=True, help="CSV with ContextTokens, GeneratedTokens")
    parser.add_argument(
        "--requests",
        type=int,
        default=500,
        help="how many of the trace, from its beginning; default: %(default)s",
    )
    parser.add_argument("--max-running", type=int, default=256, help="sequences at once")
    parser.add_argument(
        "--max-batch-tokens", type=int, default=0, help="per step; 0: each contestant's default"
    )
    parser.add_argument(
        "--tune-requests", type=int, default=32, help="requests to tune transformers with; 0: no tuning"
    )
    options = parser.parse_args(arguments)
    with options.trace.open(newline="") as file:
        lengths = read_lengths(file, options.requests, DIVISOR)
    machine, stamp = results.Machine.here(), results.Stamp.now()
    for name in options.shapes:
        shape = SHAPES[name]
        work = as_work(lengths, shape.vocab, "traffic")
        total = sum(map(len, work.prompts)), sum(work.new_tokens)
        print(f"{name}: {len(lengths)} requests, {total[0]} prompt and {total[1]} output tokens", flush=True)
        try:
            for row in measure(shape, work, options):
                results.save(options.docs / "bench", "mixed", [row], machine, stamp)
        except ContestantError as error:
            sys.exit(f"bench: {error}")
    render.write(options.docs)


if __name__ == "__main__":
    main()
