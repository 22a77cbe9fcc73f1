"""one rank with one thread beside TP and PP with one thread per rank, on one machine

Prints tokens/s of each layout, the ratio to one rank, how busy the ranks are and how much the stages overlap.
Draws a few steps of every pipeline from measured times. Example: python -m bench.pipeline --shapes 1.1b
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import render, results
from bench.measures import prompts
from bench.pipeline_plot import draw
from bench.pipeline_spans import RecordingEngine, Span, busy_share, overlap_share, read, record
from bench.shapes import CACHE, SHAPES, Shape, checkpoint
from engine.errors import ModelError
from engine.request import Request, SamplingParams

LAYOUTS = ["1x1", "2x1", "1x2"]
SHOWN = 12  # micro-batches in the picture


def run(engine: RecordingEngine, work: Sequence[list[int]], new_tokens: int) -> tuple[float, float, int]:
    """Seconds until every prompt has its first token, seconds after that, and tokens sampled after that."""
    for number, prompt in enumerate(work):
        engine.submit(Request(str(number), tuple(prompt), SamplingParams(0.0), new_tokens, ignore_eos=True))
    begin = first = time.perf_counter()
    started: set[str] = set()
    later = 0
    while engine.busy:
        deltas = engine.step()
        if len(started) == len(work):
            later += sum(len(delta.token_ids) for delta in deltas)
        elif not started.update(delta.id for delta in deltas) and len(started) == len(work):
            first = time.perf_counter()
    return first - begin, time.perf_counter() - first, later


def measure(
    shape: Shape, layout: str, options: argparse.Namespace, spans: Path
) -> tuple[results.Row, list[Span]]:
    """The figures of one layout (the best of its repeats), and the spans of its last run's decode steps."""
    tp, pp = map(int, layout.split("x"))
    RecordingEngine.spans = spans
    with RecordingEngine(
        str(checkpoint(shape, options.cache)),
        tp=tp,
        pp=pp,
        threads=1,
        dtype=options.dtype,
        quantization=options.quantization,
        max_model_len=options.prompt + options.new_tokens,
        max_running=max(options.batch, 1),
        prefix_cache=False,
    ) as engine:
        prefill = decode = 0.0
        for repeat in range(options.repeats + 1):  # repeat 0 warms up
            work = prompts(options.batch, options.prompt, shape.vocab, repeat)
            spans.write_text("")
            until_first, after, tokens = run(engine, work, options.new_tokens if repeat else 8)
            if repeat:
                prefill = max(prefill, options.batch * options.prompt / until_first)
                decode = max(decode, tokens / after)
        recorded = read(spans)
    prompts_end = max((span.step for span in recorded if span.tokens > options.batch), default=0)
    steady = [span for span in recorded if span.step > prompts_end]
    row: results.Row = {
        "shape": shape.name,
        "weights": options.quantization or options.dtype,
        "batch": options.batch,
        "layout": layout,
        "prefill": prefill,
        "decode": decode,
        "busy": [busy_share(steady, rank) for rank in range(tp * pp)],
        "reducing": sum(span.reducing for span in steady) / sum(span.end - span.begin for span in steady),
        "overlap": overlap_share(steady, 0, tp) if pp > 1 else None,
    }
    return row, steady


def report(row: results.Row, single: results.Row | None) -> str:
    """One line for a layout."""
    tp, pp = row["layout"].split("x")
    text = f"  TP{tp} PP{pp}: decode {row['decode']:8.1f} tokens/s, prefill {row['prefill']:8.1f}"
    if single is not None and single is not row:
        text += f" ({row['decode'] / single['decode']:.2f}x and {row['prefill'] / single['prefill']:.2f}x)"
    text += "; ranks compute " + ", ".join(f"{share:.0%}" for share in row["busy"])
    if int(tp) > 1:
        text += f", {row['reducing']:.1%} of it in sums"
    if row["overlap"] is not None:
        text += f"; stages overlap {row['overlap']:.0%}"
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.1b"], help="default: %(default)s")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="TPxPP", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="requests at once; default: %(default)s")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt; default: %(default)s")
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="output tokens of each request; default: %(default)s"
    )
    parser.add_argument(
        "--repeats", type=int, default=2, help="runs; the best one counts; default: %(default)s"
    )
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--quantization", default="", help="int8 or int4")
    parser.add_argument("--cache", type=Path, default=CACHE, help="checkpoints")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="results; default: %(default)s")
    options = parser.parse_args(arguments)
    machine, stamp = results.Machine.here(), results.Stamp.now()
    with tempfile.TemporaryDirectory() as folder:
        spans = Path(folder) / "spans"
        record(spans)
        for name in options.shapes:
            print(f"{name}, batch {options.batch}", flush=True)
            rows: list[results.Row] = []
            for layout in options.layouts:
                try:
                    row, steady = measure(SHAPES[name], layout, options, spans)
                except ModelError as error:
                    print(f"  {layout}: {error.message}")
                    continue
                rows.append(row)
                print(report(row, next((r for r in rows if r["layout"] == "1x1"), None)), flush=True)
                if row["overlap"] is not None:
                    middle = steady[len(steady) // 2].step
                    shown = [span for span in steady if middle <= span.step < middle + SHOWN]
                    picture = options.docs / f"pipeline-{name}-{layout}.svg"
                    if draw(shown, f"{name}, TPxPP {layout}, batch {options.batch}", picture):
                        print(f"  drew {picture}", flush=True)
            results.save(options.docs / "bench", "layouts", rows, machine, stamp)
    render.write(options.docs)


if __name__ == "__main__":
    sys.exit(main())
