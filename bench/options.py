"""Options that the measurements with contestants share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bench.contest import MODULES, Entry
from bench.results import Machine
from bench.shapes import CACHE, SHAPES


def add_contest_options(parser: argparse.ArgumentParser, contestants: list[str], shapes: list[str]) -> None:
    """Options for the contestants, the shapes, and the folder of the results."""
    parser.add_argument(
        "--contestants",
        "--only",
        nargs="+",
        type=entry,
        default=[entry(name) for name in contestants],
        metavar="NAME[@VARIANT]",
        help=f"{', '.join(MODULES)}; a variant is a dtype, or int8 or int4 for phalanx. vLLM takes part only "
        f"with --vllm-python. Figures of other contestants are kept. Default: {' '.join(contestants)}",
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes, help="default: %(default)s")
    parser.add_argument("--vllm-python", default="", help="interpreter of vLLM's own environment")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    parser.add_argument("--load-timeout", type=float, default=900, help="seconds to build a contestant")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds of one run")
    parser.add_argument("--cache", type=Path, default=CACHE, help="checkpoints and logs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="results; default: %(default)s")


def slow_bfloat16(contestants: list[str]) -> list[str]:
    """`contestants` if this CPU has no bfloat16 instructions, else none."""
    fast = {"avx512_bf16", "amx_bf16"}
    return [] if fast & set(Machine.here().isa.split()) else contestants


def taking_part(options: argparse.Namespace) -> list[Entry]:
    """The chosen contestants, without vLLM if its interpreter is not given."""
    entries: list[Entry] = options.contestants
    return [entry for entry in entries if options.vllm_python or not entry.kind.startswith("vllm")]


def entry(text: str) -> Entry:
    """`Entry.parse` with the error that argparse expects."""
    try:
        return Entry.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
