"""writes docs/benchmarks.md and its plot from the figures in docs/bench

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
# /proc/cpuinfo of a virtual machine may hide which CPU it is. By the name there and the instruction sets.
_MICROARCHITECTURES = {
    ("Intel(R) Xeon(R) Processor @ 2.50GHz", "avx2 avx512f avx512_vnni"): "Cascade Lake",
}
_INTRODUCTION = """# Benchmarks

`python -m bench.render` writes this page from `docs/bench/*.json`. `make bench-engine` measures everything
again.

All figures are from one machine. All contestants get the same checkpoint, the same token ids and all cores.
Each is a process of its own, which is stopped while another one runs. They take turns. A figure is the
median of its turns; the minimum and the maximum are in brackets. The weights are random, because weights do
not change speed.
"""
_DECODE = """## Decode

Prompts of 128 tokens, 64 new tokens each, greedy, weights in bfloat16. Tokens/s counts only the time in
which all sequences decode: from the first token of the last prompt to the last token of the first prompt.

A step reads every weight once. So tokens/s ÷ batch × bytes of weights is the implied memory traffic, in
GB/s. Its share of the memory limit matters at small batches, the share of the GEMM limit at large ones. A
dashed line in the plot is the lower of the two limits, as tokens/s. A contestant with `float32` behind its
name computes the same checkpoint in float32.
"""
_PREFILL = """## Prefill

4,096 prompt tokens at once, measured until the first token of the last prompt. Operations are counted as 2
× parameters of the layers' matrices × tokens, plus 2 × parameters of the LM head × prompts, plus for
attention 2 × layers × hidden size × length² per prompt (causal: half of all pairs, two products of 2
operations each).
"""
_PRODUCTS = """### Matrix products alone

What the merged matrices of a layer reach by themselves (`python -m bench.products`), in GFLOP/s and in
turns: Phalanx with weights in bfloat16, torch with weights in float32. Prefill spends nearly all of its
time in these products, so this is its limit here. The GEMM limit above is the best of square products,
which are larger than those of a small model.
"""
_MIXED = """## Mixed traffic

The first requests of the Azure conversation trace of 2023, with the lengths of prompt and output divided by
8, all sent at once. Tokens/s counts prompts and output together.
"""
_LATENCY = """## A long prompt among decodes

16 requests decode; then a prompt of 512 tokens arrives. A gap is the time between two tokens of one of the
16 requests. The table has the median gap before the prompt arrives, and the longest gap until the prompt
has its first token.
"""
_MEMORY = """## Loading and memory

The peak memory of all processes of a contestant together (VmHWM), once when it was ready and once after its
last run here. Phalanx and vLLM each have a KV pool of 1 GiB; that of Phalanx takes memory only as it fills.
The budget of a rank is its weights, its KV memory and 400 MB.
"""
_LAYOUTS = """## More ranks on one machine

Phalanx alone, one thread per rank, all requests at once (`python -m bench.pipeline`). *Busy* is the share
of the time in which a rank computes, including its all-reduces. *Overlap* is the time in which both of the
first two stages compute, divided by the time in which at least one does. A picture shows steps of a
pipeline from measured times, with a colour per micro-batch.
"""
_QUANTISED = """## Quantised weights

int8 has a scale per row; int4 has a scale per row and 64 columns.
"""
_QUALITY = """Perplexity of the demo model (`phalanx demo-model`) on files of the standard library that it
was not trained on:
"""


def write(docs: Path) -> list[Path]:
    """Write the sections that have figures; returns the files written."""
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
    """A Markdown table. The first column is text, all others are numbers."""
    rule = [":--", *("--:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body]) + "\n"


def name_of(contestant: str) -> str:
    """The display name of a contestant, with its variant."""
    kind, _, variant = contestant.partition("@")
    return _NAMES.get(kind, kind) + (f", {variant}" if variant else "")


def ratio(ours: float | None, theirs: float) -> str:
    """How many times as fast Phalanx is; empty where it was not measured."""
    return "" if ours is None else f"{ours / theirs:.2f}×"


def spread(values: dict[str, float], digits: int = 1) -> str:
    """The median, and the minimum and maximum where there were repeats."""
    text = f"{values['median']:,.{digits}f}"
    if values["count"] == 1:
        return text
    return f"{text} ({values['low']:,.{digits}f}–{values['high']:,.{digits}f})"


def _machine(machine: dict[str, Any] | None, limits: list[Row]) -> list[str]:
    if machine is None:
        return []
    known = _MICROARCHITECTURES.get((machine["cpu"], machine["isa"]), "")
    text = (
        f"Machine: {machine['cpu']}{f' ({known})' if known else ''}, {machine['cores']} cores "
        f"({machine['isa'].replace(' ', ', ')}), {machine['memory_gib']} GiB, {machine['system']}."
    )
    if not {"avx512_bf16", "amx_bf16"} & set(machine["isa"].split()):
        text += (
            " This CPU has no bfloat16 instructions, so the other contestants are measured in float32, too: "
            "they are mostly faster in it here."
        )
    for row in limits:
        text += (
            "\n\nLimits of this machine, measured with all threads: "
            f"memory read {row['memory'] / 1e9:.1f} GB/s, GEMM {row['gemm_float32'] / 1e9:.0f} GFLOP/s in "
            f"float32 and {row['gemm_bfloat16'] / 1e9:.0f} in bfloat16. The GEMM limit below is the better "
            "of the two. The limits are measured again in each turn, and shares are of that turn's limits."
        )
    return [text]


def _decode(rows: list[Row]) -> list[str]:
    parts = []
    head = [
        "Contestant",
        "Batch",
        "Tokens/s",
        "with prefill",
        "GB/s of weights",
        "of memory limit",
        "of GEMM limit",
    ]
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
        parts += [f"### {shape}", table([*head, "Phalanx vs. this", "measured"], body)]
    return parts


def _prefill(rows: list[Row]) -> list[str]:
    parts = []
    head = [
        "Contestant",
        "Prompts",
        "Tokens/s",
        "first token",
        "GFLOP/s",
        "of GEMM limit",
        "Phalanx vs. this",
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
    head = ["Matrix", "Size", "Rows of activations", "Phalanx", "torch", "Phalanx vs. this", "measured"]
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
    head = [
        "Contestant",
        "Requests",
        "Tokens/s",
        "output tokens/s",
        "seconds",
        "Phalanx vs. this",
        "measured",
    ]
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
    head = ["Layout", "Weights", "Batch", "Tokens/s", "vs. one rank", "busy", "overlap", "measured"]
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
    head = [
        "Contestant",
        "Ready after",
        "weights",
        "peak when ready",
        "beyond weights",
        "peak at the end",
        "measured",
    ]
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
    """The versions of each contestant, as it reported them."""
    lines = {row["contestant"]: f"- {name_of(row['contestant'])}: {row['details']}" for row in rows}
    return "\n".join(lines.values())


def _quantisation(quantised: list[Row], decode: list[Row]) -> list[str]:
    if not quantised:
        return []
    head = ["Weights", "Shape", "Batch", "Tokens/s", "GB/s of weights", "vs. bfloat16", "measured"]
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
    return [_QUALITY, table(["Weights", "Perplexity", "vs. float32", "tokens", "measured"], body)]


def _times(row: Row, rows: list[Row], fields: tuple[str, ...], figure: Any) -> str:
    """Phalanx's figure at the same point, divided by this row's."""
    ours = [figure(r) for r in rows if r["contestant"] == OURS and _same(r, row, fields)]
    return "" if row["contestant"] == OURS else ratio(ours[0] if ours else None, figure(row))


def _same(a: Row, b: Row, fields: tuple[str, ...]) -> bool:
    return all(a[field] == b[field] for field in fields)


def _grouped(rows: list[Row], field: str) -> list[tuple[str, list[Row]]]:
    return [
        (value, [r for r in rows if r[field] == value]) for value in dict.fromkeys(r[field] for r in rows)
    ]


def _rank(row: Row) -> tuple[int, str]:
    """Sort key: Phalanx first, then the order of `_NAMES`."""
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
