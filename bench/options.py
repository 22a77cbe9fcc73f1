"""Options that the measurements with contestants share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from bench.contest import MODULES, Entry
from bench.results import Machine
from bench.shapes import CACHE, SHAPES


def add_contest_options(parser: argparse.ArgumentParser, contestants: list[str], shapes: list[str]) -> None:
    """Who takes part, on what, and where results go."""
    parser.add_argument(
        "--contestants",
        "--only",
        nargs="+",
        type=entry,
        default=[entry(name) for name in contestants],
        metavar="NAME[@VARIANT]",
        help=f"{', '.join(MODULES)}; a variant is a dtype, or int8 or int4 of phalanx. vLLM takes part where "
        f"--vllm-python is given. Others' figures in the results stay. Default: {' '.join(contestants)}",
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
    """These contestants, on a CPU that has no instructions for bfloat16; elsewhere none."""
    fast = {"avx512_bf16", "amx_bf16"}
    return [] if fast & set(Machine.here().isa.split()) else contestants


def taking_part(options: argparse.Namespace) -> list[Entry]:
    """The contestants, without vLLM where its interpreter is not known."""
    entries: list[Entry] = options.contestants
    return [entry for entry in entries if options.vllm_python or not entry.kind.startswith("vllm")]


def entry(text: str) -> Entry:
    """For argparse."""
    try:
        return Entry.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
