"""time to first token of a 512-token prompt that arrives while 16 requests decode, and the gaps it causes

Example: python -m bench.latency --vllm-python ~/vllm/bin/python
"""

from __future__ import annotations

import argparse
import statistics
import sys

from bench import render, results
from bench.contest import ContestantError, contest
from bench.measures import Spread, first_token_s, gaps_s, prompts
from bench.options import add_contest_options, taking_part
from bench.protocol import Setup, Trace, Work
from bench.shapes import SHAPES, Shape, checkpoint

CONTESTANTS = ["phalanx", "vllm"]
DECODING, DECODING_PROMPT, LONG_PROMPT = 16, 32, 512
STEPS_BEFORE, STEPS_AFTER, LONG_OUTPUT = 24, 100, 8


def work(shape: Shape, repeat: int) -> Work:
    """16 short prompts with long outputs, and a long prompt that arrives while they decode."""
    short = prompts(DECODING, DECODING_PROMPT, shape.vocab, f"short {repeat}")
    (late,) = prompts(1, LONG_PROMPT, shape.vocab, f"long {repeat}")
    outputs = [STEPS_BEFORE + STEPS_AFTER] * DECODING + [LONG_OUTPUT]
    return Work([*short, late], outputs, late=1, late_after=STEPS_BEFORE)


def figures(trace: Trace) -> dict[str, float]:
    """Time to the late prompt's first token; the others' median gap before it arrived, and longest gap after.

    A gap after the late prompt counts until that prompt has its first token.
    """
    arrived, wait = trace.submitted[-1], first_token_s(trace)[-1]
    settled = max(trace.submitted[i] + first for i, first in enumerate(first_token_s(trace)[:DECODING]))
    return {
        "first_token_s": wait,
        "median_gap_s": statistics.median(gaps_s(trace, range(DECODING), settled, arrived)),
        "longest_gap_s": max(gaps_s(trace, range(DECODING), arrived, arrived + wait)),
    }


def measure(shape: Shape, options: argparse.Namespace) -> list[results.Row]:
    """Measure all contestants on one shape. Each figure is the median of its repeats."""
    setup = Setup(
        str(checkpoint(shape, options.cache).absolute()), threads=options.threads, max_model_len=1024
    )
    rows = []
    logs = options.cache / "logs"
    entries = taking_part(options)
    with contest(entries, setup, options.vllm_python, logs, options.load_timeout) as running:
        found: list[list[dict[str, float]]] = [[] for _ in running]
        for repeat in range(options.repeats + 1):
            for contestant, its in zip(running, found, strict=True):
                its.append(figures(contestant.run(work(shape, repeat), options.timeout)))
        for contestant, its in zip(running, found, strict=True):
            spreads = {name: Spread.of([each[name] for each in its[1:]]) for name in its[0]}  # 0 warms up
            row: results.Row = {"shape": shape.name, "contestant": str(contestant.entry)}
            row |= {name: spread.median for name, spread in spreads.items()}
            rows.append(row)
            print(
                f"  {contestant.entry!s:<22} first token {row['first_token_s'] * 1000:.0f} ms, median gap "
                f"{row['median_gap_s'] * 1000:.1f} ms, longest {row['longest_gap_s'] * 1000:.1f} ms "
                f"({row['longest_gap_s'] / row['median_gap_s']:.1f} medians)",
                flush=True,
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_contest_options(parser, CONTESTANTS, ["135m"])
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args(arguments)
    machine, stamp = results.Machine.here(), results.Stamp.now()
    for name in options.shapes:
        print(name, flush=True)
        try:
            rows = measure(SHAPES[name], options)
        except ContestantError as error:
            sys.exit(f"bench: {error}")
        results.save(options.docs / "bench", "latency", rows, machine, stamp)
    render.write(options.docs)


if __name__ == "__main__":
    main()
