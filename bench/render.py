"""docs/benchmarks.md and its plot, from the figures in docs/bench

Example: python -m bench.render
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import plot, results
from bench.results import Row

OURS = "phalanx"
_NAMES = {
    "phalanx": "Phalanx",
    "transformers": "transformers `generate`",
    "transformers-static": "transformers `generate`, static cache",
    "transformers-batching": "transformers continuous batching",
    "vllm": "vLLM, compiled",
    "vllm-eager": "vLLM, eager",
}
_INTRODUCTION = """# Benchmarks

Written by `python -m bench.render` from `docs/bench/*.json`; `make bench-engine` measures it all again.
Every figure comes from one machine. Contestants get the same checkpoint, the same token ids and all cores,
each in a process of its own that is stopped while another runs; they take turns, and a figure is the median
of the turns with the least and the most in brackets. Checkpoints have random weights, which change no
speed.
"""
_DECODE = """## Decode

Prompts of 128 tokens, 64 new tokens of each, greedy, weights in bfloat16. Tokens/s count while all decode:
from the last prompt's first token to the first prompt's last one. A step reads every weight once, so
tokens/s ÷ batch × bytes of weights is the memory traffic that they imply. Its share of the memory limit
matters at small batches, the share of the GEMM limit at large ones; the dashed lines are what the lower of
the two limits allows. A contestant with `float32` behind its name computes the same checkpoint in float32.
"""
_PREFILL = """## Prefill

4,096 prompt tokens at once, to the first token of the last prompt. Operations: 2 × parameters of the
layers' matrices × tokens, 2 × parameters of the LM head × prompts, and for attention 2 × layers × hidden
size × length² per prompt (causal: half of all pairs, two products of 2 operations each).
"""
_PRODUCTS = """### The products alone

What a layer's merged matrices reach by themselves (`python -m bench.products`): ours with weights in
bfloat16, torch's in float32, GFLOP/s, in turns. It is the limit of prefill here: nearly all of its time is in
them. The GEMM limit above is the best of square products, larger than those of a small model.
"""
_MIXED = """## Mixed traffic

The first requests of the Azure conversation trace of 2023, lengths of prompt and output divided by 8, all
sent at once. Tokens/s count prompts and output together.
"""
_LATENCY = """## A long prompt among decodes

16 requests decode; then a prompt of 512 tokens arrives. The gaps are those between two tokens of one of the
16: the median before it arrives, and the longest until its first token.
"""
_MEMORY = """## Loading and memory

The most memory that a contestant's processes have held together (VmHWM), when it was up and after its last
run here. vLLM and we have a KV pool of 1 GiB, ours touched as it fills. The budget of a rank is its
weights, its KV memory and 400 MB.
"""
_LAYOUTS = """## More ranks on one machine

Phalanx alone, one thread per rank, all requests at once (`python -m bench.pipeline`). Busy is the time that
the ranks compute, sums over a row included; overlap is the time that both of the first two stages compute,
of the time that either does. Pictures show steps of a pipeline from measured times, a colour per micro-batch.
"""
_QUANTISED = """## Quantised weights

Weights in int8 with a scale per row, or int4 with a scale per row and 64 columns.
"""
_QUALITY = """Perplexity of the demo model (`phalanx demo-model`) on files of the standard library that it
was not trained on:
"""


def write(docs: Path) -> list[Path]:
    """Write what can be written from the figures there are; returns the files."""
    sections = {name: results.load(docs / "bench", name) for name in results.KEYS}
    text = document(sections)
    page = docs / "benchmarks.md"
    page.write_text(text)
    drawn = plot.draw(sections["decode"].get("rows", []), docs / "benchmarks.svg")
    return [page, *([docs / "benchmarks.svg"] if drawn else [])]


def document(sections: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    rows = {name: section.get("rows", []) for name, section in sections.items()}
    machine = next((section["machine"] for section in sections.values() if section), None)
    plain = [row for row in rows["decode"] if not _quantised(row)]
    quantised = [row for row in rows["decode"] if _quantised(row)]
    parts = [_INTRODUCTION, *_machine(machine, rows["limits"])]
    if plain:
        parts += [_DECODE, "![Decode throughput](benchmarks.svg)", *_decode(plain)]
    if rows["prefill"]:
        parts += [_PREFILL, *_prefill(rows["prefill"])]
    if rows["products"]:
        parts += [_PRODUCTS, _products(rows["products"])]
    if rows["mixed"]:
        parts += [_MIXED, _mixed(rows["mixed"])]
    if rows["latency"]:
        parts += [_LATENCY, _latency(rows["latency"])]
    if rows["layouts"]:
        parts += [_LAYOUTS, *_layouts(rows["layouts"])]
    if quantised or rows["quality"]:
        parts += [_QUANTISED, *_quantisation(quantised, rows["decode"]), *_quality(rows["quality"])]
    if rows["contestants"]:
        parts += [_MEMORY, _memory(rows["contestants"]), _details(rows["contestants"])]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns but the first are numbers."""
    rule = [":--", *("--:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body]) + "\n"


def name_of(contestant: str) -> str:
    """How a contestant is called, with its variant."""
    kind, _, variant = contestant.partition("@")
    return _NAMES.get(kind, kind) + (f", {variant}" if variant else "")


def ratio(ours: float | None, theirs: float) -> str:
    """How many times as fast we are."""
    return "" if ours is None else f"{ours / theirs:.2f}×"


def spread(values: dict[str, float], digits: int = 1) -> str:
    """The median, with the extremes where there were repeats."""
    text = f"{values['median']:,.{digits}f}"
    if values["count"] == 1:
        return text
    return f"{text} ({values['low']:,.{digits}f}–{values['high']:,.{digits}f})"


def _machine(machine: dict[str, Any] | None, limits: list[Row]) -> list[str]:
    if machine is None:
        return []
    text = (
        f"Machine: {machine['cpu']}, {machine['cores']} cores ({machine['isa']}), "
        f"{machine['memory_gib']} GiB, {machine['system']}."
    )
    for row in limits:
        text += (
            f" Its limits, measured with all threads: memory read {row['memory'] / 1e9:.1f} GB/s, GEMM "
            f"{row['gemm_float32'] / 1e9:.0f} GFLOP/s in float32 and {row['gemm_bfloat16'] / 1e9:.0f} in "
            "bfloat16; the GEMM limit is the better one, and "
            "shares are of the limits measured again in each turn."
        )
    return [text]


def _decode(rows: list[Row]) -> list[str]:
    parts = []
    head = ["Contestant", "Batch", "Tokens/s", "with prefill", "GB/s of weights", "of memory", "of GEMM"]
    for shape, its in _grouped(rows, "shape"):
        body = []
        for row in sorted(its, key=lambda row: (row["batch"], _rank(row))):
            body.append(
                [
                    name_of(row["contestant"]),
                    str(row["batch"]),
                    spread(row["decode"]),
                    f"{row['total']['median']:,.1f}",
                    f"{row['weights_bytes_per_s'] / 1e9:.1f}",
                    f"{row['memory_share']:.0%}",
                    f"{row['gemm_share']:.0%}",
                    _times(row, its, ("batch",), lambda row: row["decode"]["median"]),
                    _when(row),
                ]
            )
        parts += [f"### {shape}", table([*head, "Phalanx is", "measured"], body)]
    return parts


def _prefill(rows: list[Row]) -> list[str]:
    parts = []
    head = [
        "Contestant",
        "Prompts",
        "Tokens/s",
        "first token",
        "GFLOP/s",
        "of GEMM",
        "Phalanx is",
        "measured",
    ]
    for shape, its in _grouped(rows, "shape"):
        body = [
            [
                name_of(row["contestant"]),
                f"{row['count']} × {row['length']}",
                spread(row["prefill"], 0),
                f"{row['first_token_s']:.2f} s",
                f"{row['flops_per_s'] / 1e9:.0f}",
                f"{row['gemm_share']:.0%}",
                _times(row, its, ("count", "length"), lambda row: row["prefill"]["median"]),
                _when(row),
            ]
            for row in sorted(its, key=lambda row: (-row["count"], _rank(row)))
        ]
        parts += [f"### {shape}", table(head, body)]
    return parts


def _products(rows: list[Row]) -> str:
    head = ["Matrix", "Size", "Rows of activations", "Ours", "torch", "Phalanx is", "measured"]
    return table(
        head,
        (
            [
                f"{row['shape']} {row['matrix']}",
                row["size"],
                str(row["rows"]),
                f"{row['ours'] / 1e9:.0f}",
                f"{row['torch'] / 1e9:.0f}",
                f"{row['ours'] / row['torch']:.2f}×",
                _when(row),
            ]
            for row in rows
        ),
    )


def _mixed(rows: list[Row]) -> str:
    head = ["Contestant", "Requests", "Tokens/s", "output tokens/s", "seconds", "Phalanx is", "measured"]
    return table(
        head,
        [
            [
                name_of(row["contestant"]),
                f"{row['requests']} ({row['shape']})",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['output_tokens_per_s']:,.0f}",
                f"{row['seconds']:.1f}",
                _times(row, rows, ("shape", "requests"), lambda row: row["tokens_per_s"]),
                _when(row),
            ]
            for row in rows
        ],
    )


def _latency(rows: list[Row]) -> str:
    head = ["Contestant", "First token", "median gap", "longest gap", "longest ÷ median", "measured"]
    return table(
        head,
        [
            [
                f"{name_of(row['contestant'])} ({row['shape']})",
                f"{row['first_token_s'] * 1000:,.0f} ms",
                f"{row['median_gap_s'] * 1000:.1f} ms",
                f"{row['longest_gap_s'] * 1000:.1f} ms",
                f"{row['longest_gap_s'] / row['median_gap_s']:.1f}",
                _when(row),
            ]
            for row in rows
        ],
    )


def _layouts(rows: list[Row]) -> list[str]:
    head = ["Layout", "Weights", "Batch", "Tokens/s", "beside one rank", "busy", "overlap", "measured"]
    body, pictures = [], []
    for row in rows:
        point = ("shape", "weights", "batch")
        single = [r["decode"] for r in rows if r["layout"] == "1x1" and _same(r, row, point)]
        tp, pp = row["layout"].split("x")
        body.append(
            [
                f"TP{tp} PP{pp} ({row['shape']})",
                row["weights"],
                str(row["batch"]),
                f"{row['decode']:,.1f}",
                f"{row['decode'] / single[0]:.2f}×" if single else "",
                ", ".join(f"{share:.0%}" for share in row["busy"]),
                "" if row["overlap"] is None else f"{row['overlap']:.0%}",
                _when(row),
            ]
        )
        if row["overlap"] is not None:
            pictures.append(f"![Steps of TP{tp} PP{pp}](pipeline-{row['shape']}-{row['layout']}.svg)")
    return [table(head, body), *dict.fromkeys(pictures)]


def _memory(rows: list[Row]) -> str:
    head = ["Contestant", "Ready after", "weights", "held when up", "beyond weights", "at most", "measured"]
    return table(
        head,
        [
            [
                f"{name_of(row['contestant'])} ({row['shape']})",
                f"{row['load_s']:.1f} s",
                _mb(row["weights_bytes"]),
                _mb(row["load_peak_bytes"]),
                _mb(row["load_peak_bytes"] - row["weights_bytes"]),
                _mb(row["peak_bytes"]),
                _when(row),
            ]
            for row in rows
        ],
    )


def _details(rows: list[Row]) -> str:
    """Versions, as each contestant tells them."""
    lines = {row["contestant"]: f"- {name_of(row['contestant'])}: {row['details']}" for row in rows}
    return "\n".join(lines.values())


def _quantisation(quantised: list[Row], decode: list[Row]) -> list[str]:
    if not quantised:
        return []
    head = ["Weights", "Shape", "Batch", "Tokens/s", "GB/s of weights", "beside bfloat16", "measured"]
    body = []
    for row in quantised:
        plain = [r for r in decode if r["contestant"] == OURS and _same(r, row, ("shape", "batch"))]
        times = row["decode"]["median"] / plain[0]["decode"]["median"] if plain else None
        body.append(
            [
                row["contestant"].partition("@")[2],
                row["shape"],
                str(row["batch"]),
                spread(row["decode"]),
                f"{row['weights_bytes_per_s'] / 1e9:.1f}",
                "" if times is None else f"{times:.2f}×",
                _when(row),
            ]
        )
    return [table(head, body)]


def _quality(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    base = next((row["perplexity"] for row in rows if row["weights"] == "float32"), None)
    body = [
        [
            row["weights"],
            f"{row['perplexity']:.4f}",
            "" if base is None else f"{row['perplexity'] / base - 1:+.2%}",
            f"{row['tokens']:,}",
            _when(row),
        ]
        for row in rows
    ]
    return [_QUALITY, table(["Weights", "Perplexity", "beside float32", "tokens", "measured"], body)]


def _times(row: Row, rows: list[Row], fields: tuple[str, ...], figure: Any) -> str:
    """Our figure at the same point over this one."""
    ours = [figure(r) for r in rows if r["contestant"] == OURS and _same(r, row, fields)]
    return "" if row["contestant"] == OURS else ratio(ours[0] if ours else None, figure(row))


def _same(a: Row, b: Row, fields: tuple[str, ...]) -> bool:
    return all(a[field] == b[field] for field in fields)


def _grouped(rows: list[Row], field: str) -> list[tuple[str, list[Row]]]:
    return [
        (value, [r for r in rows if r[field] == value]) for value in dict.fromkeys(r[field] for r in rows)
    ]


def _rank(row: Row) -> tuple[int, str]:
    """Ours first, then as they are listed."""
    kind, _, variant = row["contestant"].partition("@")
    return list(_NAMES).index(kind), variant


def _quantised(row: Row) -> bool:
    return str(row["contestant"]).partition("@")[2] in ("int8", "int4")


def _when(row: Row) -> str:
    return f"{row['date']} {row['commit']}"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    for path in write(parser.parse_args().docs):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
