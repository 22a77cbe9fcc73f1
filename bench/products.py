"""matrix products alone: our kernels beside torch's, on the matrices of a model

Our weights are bfloat16. torch multiplies in float32, which is faster than its bfloat16 on a CPU without
bfloat16 instructions. The two take turns, and a figure is the median of the turns.
Example: python -m bench.products --shapes 135m 1.1b --rows 1 32 512
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench import render, results
from bench.shapes import SHAPES, Shape

TURNS = 9
TURN_S = 0.02


def matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's merged matrices."""
    kv = shape.kv_heads * shape.head_dim
    return {
        "QKV": (shape.hidden + 2 * kv, shape.hidden),
        "O": (shape.hidden, shape.hidden),
        "gate and up": (2 * shape.mlp, shape.hidden),
        "down": (shape.hidden, shape.mlp),
    }


def measure(shape: Shape, rows: int, threads: int) -> Iterator[results.Row]:
    """Floating-point operations per second for each matrix, ours and torch's."""
    import torch

    from engine.kernels.choose import choose_kernels

    kernels = choose_kernels(torch.device("cpu"), torch.bfloat16, threads=threads)
    for name, (out, columns) in matrices(shape).items():
        weight, x = torch.randn(out, columns), torch.randn(rows, columns)
        matrix = kernels.matrix(out, columns)
        matrix.write(0, weight)
        operations = 2 * rows * out * columns
        ours, theirs = _in_turns(partial(kernels.linear, x, matrix), partial(torch.matmul, x, weight.T))
        yield {
            "shape": shape.name,
            "matrix": name,
            "rows": rows,
            "size": f"{out} × {columns}",
            "ours": operations / ours,
            "torch": operations / theirs,
        }


def _in_turns(*works: Callable[[], object]) -> list[float]:
    """The median seconds of each function."""
    times: list[list[float]] = [[] for _ in works]
    repeats = [max(1, int(TURN_S / _seconds(work, 1))) for work in works]  # this also warms up
    for _ in range(TURNS):
        for mine, work, count in zip(times, works, repeats, strict=True):
            mine.append(_seconds(work, count))
    return [statistics.median(mine) for mine in times]


def _seconds(work: Callable[[], object], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m", "1.1b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 512])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    machine, stamp = results.Machine.here(), results.Stamp.now()
    with torch.inference_mode():
        for name in options.shapes:
            for rows in options.rows:
                found = list(measure(SHAPES[name], rows, options.threads))
                for row in found:
                    rates = f"ours {row['ours'] / 1e9:4.0f}, torch {row['torch'] / 1e9:4.0f} GFLOP/s"
                    print(f"{name} {row['matrix']:<12} {rows:>4} rows: {rates}", flush=True)
                results.save(options.docs / "bench", "products", found, machine, stamp)
    render.write(options.docs)


if __name__ == "__main__":
    main()
