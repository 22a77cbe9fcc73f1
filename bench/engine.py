"""the engine beside transformers and vLLM: decode and prefill, on one machine, with one checkpoint

Every contestant is a process of its own, which is stopped while another one runs. All contestants run each
point in turn, several times, and the medians are compared: for decode, tokens/s while all sequences decode;
for prefill, the time until the last prompt has its first token. Shares are of the machine's limits
(bench.limits). The limits are measured in every turn, because the clock of a shared machine changes.
On a CPU without bfloat16 instructions, the other contestants run in float32 too, where they are faster.
Writes docs/bench/*.json, docs/benchmarks.md and its plot. Figures that are not measured again stay, with
their date.

Example: python -m bench.engine --vllm-python ~/vllm/bin/python
         python -m bench.engine --only phalanx --shapes 135m --batches 1 --repeats 1
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from bench import limits as machine_limits
from bench import render, results
from bench.contest import Contestant, ContestantError, Entry, contest, memory_left, relays
from bench.measures import (
    Limits,
    Spread,
    common_prefix,
    decode_flops_rate,
    decode_limit,
    decode_rate,
    first_token_s,
    prompts,
    total_rate,
    weights_rate,
)
from bench.options import add_contest_options, slow_bfloat16, taking_part
from bench.protocol import Setup, Trace, Work
from bench.shapes import SHAPES, Shape, checkpoint

CONTESTANTS = ["phalanx", "transformers", "vllm"]
IN_FLOAT32 = ["transformers@float32", "vllm@float32"]
WARM_UP_PROMPT, WARM_UP_TOKENS = 4, 4
TURN_READ_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Point:
    """`count` prompts of `length` tokens, `new_tokens` for each."""

    count: int
    length: int
    new_tokens: int

    def work(self, shape: Shape, repeat: int) -> Work:
        """Prompts that no other point or repeat has, so that a prefix cache finds nothing."""
        seed = f"{self} {repeat}"
        return Work(prompts(self.count, self.length, shape.vocab, seed), [self.new_tokens] * self.count)


def repeated(
    running: Sequence[Contestant], shape: Shape, point: Point, options: argparse.Namespace
) -> Iterator[tuple[Contestant, list[Trace], Work, Limits]]:
    """Run a point: a short prompt to warm up, then all contestants in turn, `options.repeats` times.

    Yields each contestant with its traces, its work and the machine's limits. Stops repeating when the point
    has taken `options.budget` seconds.
    """
    warm = Point(1, WARM_UP_PROMPT, WARM_UP_TOKENS).work(shape, 0)
    for contestant in running:
        contestant.run(warm, options.timeout)
    traces: list[list[Trace]] = [[] for _ in running]
    turns: list[Limits] = []
    end = time.monotonic() + options.budget
    for repeat in range(options.repeats):
        if repeat and time.monotonic() > end:
            break
        work = point.work(shape, repeat + 1)
        turns.append(machine_limits.measured(options.threads, TURN_READ_BYTES))
        for contestant, its in zip(running, traces, strict=True):
            its.append(contestant.run(work, options.timeout))
    for contestant, its in zip(running, traces, strict=True):
        share = common_prefix(its[-1].token_ids, traces[0][-1].token_ids)
        if share < 1:
            print(f"    {contestant.entry}: {share:.0%} of first tokens are those of {running[0].entry}")
        yield contestant, its, work, Limits.median(turns)


def decode_row(
    shape: Shape, contestant: Contestant, point: Point, traces: list[Trace], work: Work, limits: Limits
) -> results.Row:
    """The figures of one contestant at one batch size."""
    decode = Spread.of([decode_rate(trace) for trace in traces])
    size = contestant.entry.bytes_per_parameter
    read = weights_rate(shape, point.count, decode.median, size)
    flops = decode_flops_rate(shape, work, decode.median)
    return {
        "shape": shape.name,
        "contestant": str(contestant.entry),
        "batch": point.count,
        "prompt_tokens": point.length,
        "new_tokens": point.new_tokens,
        "decode": asdict(decode),
        "total": asdict(Spread.of([total_rate(trace) for trace in traces])),
        "weights_bytes_per_s": read,
        "memory_share": read / limits.memory,
        "gemm_share": flops / limits.gemm,
        "limit": decode_limit(shape, work, limits, size),
    }


def prefill_row(
    shape: Shape, contestant: Contestant, point: Point, traces: list[Trace], limits: Limits
) -> results.Row:
    """The figures of one contestant for prompts of one length."""
    tokens = point.count * point.length
    rate = Spread.of([tokens / max(first_token_s(trace)) for trace in traces])
    flops = shape.prefill_flops([point.length] * point.count) / tokens * rate.median
    return {
        "shape": shape.name,
        "contestant": str(contestant.entry),
        "count": point.count,
        "length": point.length,
        "prefill": asdict(rate),
        "first_token_s": tokens / rate.median,
        "flops_per_s": flops,
        "gemm_share": flops / limits.gemm,
    }


def contestant_row(shape: Shape, contestant: Contestant, peak: int) -> results.Row:
    """The versions of a contestant, and its loading time and memory."""
    weights = shape.parameters * contestant.entry.bytes_per_parameter
    return {
        "shape": shape.name,
        "contestant": str(contestant.entry),
        "name": contestant.ready.name,
        "details": contestant.ready.details,
        "load_s": contestant.load_s,
        "weights_bytes": weights,
        "load_peak_bytes": contestant.ready.peak_bytes,
        "peak_bytes": peak,
    }


def measure(shape: Shape, options: argparse.Namespace) -> dict[str, list[results.Row]]:
    """All points of one shape."""
    decodes = [Point(batch, options.prompt_tokens, options.new_tokens) for batch in options.batches]
    prefills = [
        Point(count, options.prefill_tokens // count, 1) for count in options.prefill_prompts if count > 0
    ]
    longest = max([options.prompt_tokens + options.new_tokens, *(point.length + 1 for point in prefills)])
    setup = Setup(
        str(checkpoint(shape, options.cache).absolute()), threads=options.threads, max_model_len=longest
    )
    rows: dict[str, list[results.Row]] = {"contestants": [], "decode": [], "prefill": []}
    print(f"\n{shape.name}: {shape.parameters / 1e6:.1f}M parameters")
    groups = relays(taking_part(options), shape.parameters, setup.kv_bytes, memory_left())
    for group in groups:
        for section, found in compete(group, shape, setup, decodes, prefills, options).items():
            rows[section] += found
    return rows


def compete(
    entries: Sequence[Entry],
    shape: Shape,
    setup: Setup,
    decodes: Sequence[Point],
    prefills: Sequence[Point],
    options: argparse.Namespace,
) -> dict[str, list[results.Row]]:
    """Measure all points of one shape for contestants that fit into memory together."""
    rows: dict[str, list[results.Row]] = {"contestants": [], "decode": [], "prefill": []}
    peaks: dict[str, int] = {}
    logs = options.cache / "logs"
    with contest(entries, setup, options.vllm_python, logs, options.load_timeout) as running:
        for contestant in running:
            ready = contestant.ready
            print(f"  {ready.name}: up in {contestant.load_s:.1f} s, {ready.peak_bytes / 1e6:.0f} MB")
        for point in decodes:
            print(f"  decode, batch {point.count}", flush=True)
            for contestant, traces, work, limits in repeated(running, shape, point, options):
                row = decode_row(shape, contestant, point, traces, work, limits)
                rows["decode"].append(row)
                peaks[str(contestant.entry)] = traces[-1].peak_bytes
                print(f"    {contestant.entry!s:<22} {say_decode(row)}", flush=True)
        for point in prefills:
            print(f"  prefill, {point.count} x {point.length}", flush=True)
            for contestant, traces, _, limits in repeated(running, shape, point, options):
                row = prefill_row(shape, contestant, point, traces, limits)
                rows["prefill"].append(row)
                peaks[str(contestant.entry)] = traces[-1].peak_bytes
                print(f"    {contestant.entry!s:<22} {say_prefill(row)}", flush=True)
        rows["contestants"] = [
            contestant_row(shape, contestant, peaks[str(contestant.entry)]) for contestant in running
        ]
    return rows


def say_decode(row: results.Row) -> str:
    """One line of a decode row."""
    decode = row["decode"]
    return (
        f"{decode['median']:8.1f} tokens/s ({decode['low']:.1f} to {decode['high']:.1f}), "
        f"{row['weights_bytes_per_s'] / 1e9:.1f} GB/s of weights, "
        f"{row['memory_share']:.0%} of the memory limit, {row['gemm_share']:.0%} of the GEMM limit"
    )


def say_prefill(row: results.Row) -> str:
    """One line of a prefill row."""
    return (
        f"{row['prefill']['median']:8.0f} tokens/s, first token after {row['first_token_s']:.2f} s, "
        f"{row['flops_per_s'] / 1e9:.0f} GFLOP/s, {row['gemm_share']:.0%} of the GEMM limit"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_contest_options(parser, CONTESTANTS + slow_bfloat16(IN_FLOAT32), ["135m", "1.1b"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32], help="default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--prefill-tokens", type=int, default=4096, help="of all prompts together; default: %(default)s"
    )
    parser.add_argument(
        "--prefill-prompts", nargs="*", type=int, default=[32, 1], help="prompts; default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of every point; default: %(default)s")
    parser.add_argument(
        "--budget", type=float, default=300, help="seconds after which a point is not repeated again"
    )
    options = parser.parse_args(arguments)
    machine, stamp = results.Machine.here(), results.Stamp.now()
    print(f"{machine.cpu}, {machine.cores} cores, {machine.isa}")
    limits = machine_limits.measured(options.threads)
    print(
        f"memory read {limits.memory / 1e9:.1f} GB/s, "
        f"GEMM {limits.gemm_float32 / 1e9:.0f} GFLOP/s in float32, "
        f"{limits.gemm_bfloat16 / 1e9:.0f} in bfloat16"
    )
    folder = options.docs / "bench"
    results.save(folder, "limits", [asdict(limits)], machine, stamp)
    for name in options.shapes:
        try:
            sections = measure(SHAPES[name], options)
        except ContestantError as error:
            sys.exit(f"bench: {error}")
        for section, rows in sections.items():
            results.save(folder, section, rows, machine, stamp)
    print("\n" + "\n".join(f"wrote {path}" for path in render.write(options.docs)))


if __name__ == "__main__":
    main()
