"""the engine on one GPU against that GPU's own limits, and beside transformers

Decode, first tokens, gaps beside a long prompt, and how busy the driver calls the GPU under mixed arrivals.

Random weights from a config alone, bf16. Limits are measured in the same run: the rate of a copy on the
device, and of its best bf16 GEMM. A decode step reads its weights once and the keys and values of all its
sequences; the time that this takes at the rate of a copy, plus its products at the rate of a GEMM, is what it
is held against.
Example: python -m bench.gpu --shapes llama-2-7b mistral-7b
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import gpu_plot
from bench.contest import ContestantError, Entry, contest
from bench.measures import decode_rate, prompts
from bench.protocol import Setup, Work
from bench.results import Stamp
from bench.shapes import Shape, config_json
from engine import Engine
from engine.request import Request, SamplingParams

GPU_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-2-7b", 4096, 32, 32, 32, 11008, 32000, tied=False),
        Shape("mistral-7b", 4096, 32, 32, 8, 14336, 32000, tied=False),
        Shape("llama-2-13b", 5120, 40, 40, 40, 13824, 32000, tied=False),
    )
}
POINTS = ((1, 512), (32, 1024), (128, 1024), (256, 1024))  # sequences and their lengths
BESIDE_POINTS = ((1, 512), (32, 1024))  # with transformers
PEERS = ("transformers", "transformers-static", "transformers-batching")
NEW_TOKENS = 192
CHUNK = 4096  # tokens of prompts in a step, where all sequences are to decode together
BUSY_S, CLIENTS, THINK_S = 60.0, 64, 0.05
LONG = 2048
BESIDE = 16
STEPS = 64
SETTLED = 700  # decode steps until every size of batch has been recorded
KV_SHARE = 0.85
PEER_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes, read and written, and floating-point operations per second."""

    copy: float
    gemm: float


@dataclass(slots=True)
class Result:
    """One shape's figures; times in seconds."""

    shape: str
    quantization: str
    loaded_s: float
    decode: list[dict[str, float]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    first_token_s: float = 0.0
    first_token_of_gemm: float = 0.0
    gap_over_median_step: float = 0.0
    busy: float = 0.0
    busy_tokens_per_s: float = 0.0
    peers: list[dict[str, float | str]] = field(default_factory=list)


def measure_limits() -> Limits:
    """What this GPU can do."""
    import torch

    flat = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(flat)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copied = _best(lambda: other.copy_(flat))
    return Limits(2 * flat.nbytes / copied, 2 * 8192**3 / _best(lambda: a @ b))


def _best(work: Callable[[], object]) -> float:
    import torch

    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


class Bench:
    """One engine and what is asked of it."""

    def __init__(self, engine: Engine, shape: Shape) -> None:
        self._engine, self._shape, self._count = engine, shape, 0

    def submit(self, count: int, length: int, tokens: int) -> list[str]:
        """Queue random prompts."""
        names = []
        for ids in prompts(count, length, self._shape.vocab, self._count):
            self._count += 1
            names.append(str(self._count))
            request = Request(names[-1], tuple(ids), SamplingParams(temperature=0), tokens, ignore_eos=True)
            self._engine.submit(request)
        return names

    def drain(self) -> None:
        """Run until nothing is left."""
        while self._engine.busy:
            self._engine.step()

    def decode_step_s(self, count: int, length: int) -> float:
        """The median step while `count` sequences of about `length` tokens decode, all of them in each."""
        names = self.submit(count, length - STEPS, 4 * STEPS)
        begun: set[str] = set()
        while len(begun) < count:
            begun |= {delta.id for delta in self._engine.step()}
        self._engine.step()  # launched before the last one had begun, perhaps
        median = self._step_s(count)
        for name in names:
            self._engine.cancel(name)
        self.drain()
        return median

    def first_token_s(self) -> float:
        """The median time to the first token of a long prompt."""
        times = []
        for _ in range(5):
            began = time.perf_counter()
            self.submit(1, LONG, 1)
            self.drain()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def longest_gap(self) -> float:
        """Beside BESIDE decodes a long prompt comes: their longest gap, in median steps without it."""
        names = self.submit(BESIDE, 128, 2000)
        for _ in range(2 * STEPS):
            self._engine.step()
        alone = self._step_s()
        late = self.submit(1, LONG, 32)[0]
        last, longest, left = time.perf_counter(), 0.0, True
        while left:
            deltas = self._engine.step()
            now = time.perf_counter()
            if any(delta.id != late for delta in deltas):
                longest, last = max(longest, now - last), now
            left = not any(delta.id == late and delta.finish for delta in deltas)
        for name in names:
            self._engine.cancel(name)
        self.drain()
        return longest / alone

    def busy(self, seconds: float, utilisation: Callable[[], float]) -> tuple[float, float]:
        """CLIENTS ask for answers of mixed lengths, one by one: the driver's mean, and tokens per second."""
        draw, samples, tokens = random.Random(0), list[float](), 0
        began = time.perf_counter()
        end, sampled = began + seconds, began
        arrivals = [began + draw.expovariate(1 / THINK_S) for _ in range(CLIENTS)]
        while (now := time.perf_counter()) < end:
            due = [at for at in arrivals if at <= now]
            arrivals = [at for at in arrivals if at > now]
            for _ in due:
                length = min(LONG, int(draw.lognormvariate(5.5, 1.0)) + 1)
                self.submit(1, length, min(512, int(draw.lognormvariate(4.8, 0.8)) + 1))
            for delta in self._engine.step() if self._engine.busy else ():
                tokens += len(delta.token_ids)
                if delta.finish:
                    arrivals.append(now + draw.expovariate(1 / THINK_S))
            if now > sampled + 0.2:
                samples.append(utilisation())
                sampled = now
        took = time.perf_counter() - began
        self.drain()
        return statistics.mean(samples), tokens / took

    def _step_s(self, tokens: int = 0) -> float:
        """The median of the next steps; each must bring so many tokens, if any are asked for."""
        times = []
        for _ in range(STEPS):
            began = time.perf_counter()
            deltas = self._engine.step()
            times.append(time.perf_counter() - began)
            if tokens and len(deltas) != tokens:
                raise RuntimeError(f"a step brought {len(deltas)} tokens, not {tokens}: nothing was measured")
        return statistics.median(times)


def measure(shape: Shape, limits: Limits, quantization: str) -> Result:
    """All figures of one shape."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_json(shape)))
        free, _ = torch.cuda.mem_get_info()
        kv_bytes = int(free * KV_SHARE) - shape.parameters * (1 if quantization else 2)
        options: dict[str, Any] = {"dtype": "bfloat16", "load_format": "dummy", "kv_bytes": kv_bytes}
        options |= {"quantization": quantization, "max_model_len": 4096, "max_running": 256}
        began = time.perf_counter()
        # Prompts in large pieces, whoever decodes: all sequences are to be there before the first has ended.
        chunks = {"max_batch_tokens": CHUNK + 256, "max_prefill_tokens": CHUNK}
        with Engine(folder, device="cuda", **options, **chunks) as engine:
            result = Result(shape.name, quantization, time.perf_counter() - began)
            _measure_decode(result, _settled(engine, shape), shape, limits, kv_bytes)
        with Engine(folder, device="cuda", **options) as engine:
            bench = _settled(engine, shape)
            result.first_token_s = bench.first_token_s()
            result.first_token_of_gemm = shape.prefill_flops([LONG]) / result.first_token_s / limits.gemm
            result.gap_over_median_step = bench.longest_gap()
            result.busy, result.busy_tokens_per_s = bench.busy(BUSY_S, driver_utilisation())
        gc.collect()
        torch.cuda.empty_cache()
        if not quantization:
            result.peers = peers(shape, folder, PEERS, BESIDE_POINTS, "cuda", Path(folder) / "logs")
            for peer in result.peers:
                print("  " + ", ".join(f"{key} {value}" for key, value in peer.items()), flush=True)
    return result


def _settled(engine: Engine, shape: Shape) -> Bench:
    """With every size of batch recorded."""
    bench = Bench(engine, shape)
    bench.submit(1, 16, SETTLED)
    bench.drain()
    return bench


def _measure_decode(result: Result, bench: Bench, shape: Shape, limits: Limits, kv_bytes: int) -> None:
    weight_bytes = shape.step_parameters * (1 if result.quantization else 2)
    for count, length in POINTS:
        if count * (length + 4 * STEPS) * shape.kv_bytes_per_token > kv_bytes:
            result.skipped.append(f"{count} x {length}: its keys and values do not fit")
            continue
        step = bench.decode_step_s(count, length)
        read = weight_bytes + count * length * shape.kv_bytes_per_token
        least = read / limits.copy + shape.decode_flops([length] * count) / limits.gemm
        result.decode.append(
            {
                "sequences": count,
                "length": length,
                "tokens_per_s": count / step,
                "of_copy": read / step / limits.copy,
                "of_both_limits": least / step,
            }
        )
        print(
            f"  {count} x {length}: {count / step:.0f} tokens/s, {least / step:.0%} of both limits",
            flush=True,
        )


def driver_utilisation() -> Callable[[], float]:
    """What the driver says of this GPU: the share of its last sampling period in which a kernel ran.

    NaN where it cannot be asked.
    """
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    except pynvml.NVMLError as error:
        print(f"  NVML: {error}")
        return lambda: math.nan
    return lambda: pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100


def peers(
    shape: Shape,
    folder: str,
    names: Sequence[str],
    points: Sequence[tuple[int, int]],
    device: str,
    logs: Path,
) -> list[dict[str, float | str]]:
    """How fast others decode, each in a process of its own, one after another; or why one could not."""
    found: list[dict[str, float | str]] = []
    for name in names:
        most = max(count for count, _ in points)
        setup = Setup(
            folder, device=device, random_weights=True, max_running=most, max_batch_tokens=CHUNK + most
        )
        try:
            with contest([Entry(name)], setup, "", logs, PEER_TIMEOUT_S) as (peer,):
                for count, length in points:
                    work = Work(prompts(count, length, shape.vocab, "peers"), [NEW_TOKENS] * count)
                    peer.run(work, PEER_TIMEOUT_S)  # compiles
                    rate = decode_rate(peer.run(work, PEER_TIMEOUT_S))
                    point = {"name": name, "sequences": count, "length": length, "tokens_per_s": rate}
                    found.append(point)
        except ContestantError as error:
            found.append({"name": name, "failed": str(error)})
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=GPU_SHAPES, default=list(GPU_SHAPES))
    parser.add_argument("--quantization", default="", choices=("", "int8", "fp8"))
    parser.add_argument("--report", type=Path, default=Path("docs/bench/gpu.json"))
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: nothing was measured")
    limits = measure_limits()
    rates = f"copy {limits.copy / 1e12:.2f} TB/s, GEMM {limits.gemm / 1e12:.0f} TFLOP/s"
    print(f"{torch.cuda.get_device_name()}: {rates}")
    results = []
    for name in options.shapes:
        print(name, flush=True)
        results.append(measure(GPU_SHAPES[name], limits, options.quantization))
        last = results[-1]
        share = f"{last.first_token_of_gemm:.0%} of the GEMM limit"
        print(f"  first token of {LONG}: {last.first_token_s * 1e3:.0f} ms, {share}")
        print(f"  longest gap beside it: {last.gap_over_median_step:.1f} median steps")
        print(f"  busy under mixed arrivals: {last.busy:.0%}, {last.busy_tokens_per_s:.0f} tokens/s")
        write(options.report, limits, results)  # what there is, in case that the next shape fails


def write(path: Path, limits: Limits, results: Sequence[Result]) -> None:
    """Everything measured so far, and its plot."""
    import torch

    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "stamp": asdict(Stamp.now()),
        "limits": asdict(limits),
        "results": [asdict(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    gpu_plot.draw(report["results"], path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
