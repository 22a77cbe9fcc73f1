"""the limits of this machine: memory reads and matrix products (GEMM), with all threads

Memory: the faster of a sum and a dot product over tensors far larger than any cache. GEMM: the fastest
square product, in float32 and in bfloat16. Example: python -m bench.limits
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from bench.measures import Limits

READ_BYTES = 1 << 30
GEMM_SIZE = 2048
REPEATS = 8


def measured(threads: int, read_bytes: int = READ_BYTES, size: int = GEMM_SIZE) -> Limits:
    """Measure in a new process."""
    command = [sys.executable, "-m", "bench.limits", "--json", "--threads", str(threads)]
    command += ["--read-bytes", str(read_bytes), "--gemm-size", str(size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Limits(**json.loads(done.stdout))


def measure(read_bytes: int, size: int) -> Limits:
    """Measure in this process, with torch's number of threads."""
    import torch

    flat = torch.rand(read_bytes // 4)
    left, right = flat[: len(flat) // 2], flat[len(flat) // 2 :]
    read = flat.nbytes / min(_best(flat.sum), _best(lambda: torch.dot(left, right)))
    gemms = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
        gemms.append(2 * size**3 / _best(partial(torch.mm, a, b)))
    return Limits(read, *gemms)


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of REPEATS runs."""
    fastest = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--read-bytes", type=int, default=READ_BYTES)
    parser.add_argument("--gemm-size", type=int, default=GEMM_SIZE)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        limits = measure(options.read_bytes, options.gemm_size)
    if options.json:
        print(json.dumps(asdict(limits)))
        return
    print(f"memory read {limits.memory / 1e9:.1f} GB/s")
    for name in ("float32", "bfloat16"):
        print(f"{name} GEMM {getattr(limits, f'gemm_{name}') / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
