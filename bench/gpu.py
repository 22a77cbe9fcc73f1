"""the engine on one GPU against that GPU's own limits, and beside transformers

Three parts, each with an engine or processes of its own, so that each can run alone:
`decode`: tokens per second at several batch sizes.
`serve`: time to first token, gaps beside a long prompt, GPU utilisation under mixed arrivals.
`peers`: transformers, in three variants.
Each result is written to the report at once. The report keeps earlier results of the same GPU.

Weights are random, in bf16, from a config.json alone. Limits are measured in the same run: the rate of a copy
on the device (bytes read and written), and the rate of its best bf16 GEMM. The limit of a decode step is the
longer of reading the weights and multiplying by them, plus reading the keys and values of all sequences.
Example: python -m bench.gpu --shapes llama-2-7b --only decode serve
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bench import gpu_plot
from bench.contest import ContestantError, Entry, contest
from bench.measures import median_decode_rate, prompts
from bench.protocol import Setup, Work
from bench.results import Stamp
from bench.shapes import CACHE, Shape, config_json
from engine import Engine
from engine.errors import EngineError
from engine.request import Request, SamplingParams

GPU_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-2-7b", 4096, 32, 32, 32, 11008, 32000, tied=False),
        Shape("mistral-7b", 4096, 32, 32, 8, 14336, 32000, tied=False),
        Shape("llama-2-13b", 5120, 40, 40, 40, 13824, 32000, tied=False),
    )
}
POINTS = ((1, 512), (32, 1024), (128, 1024), (256, 1024))  # sequences, and their length mid-measurement
BESIDE_POINTS = ((1, 512), (32, 1024))  # those that transformers is measured at
PEERS = ("transformers", "transformers-static", "transformers-batching")
PARTS = ("decode", "serve", "peers")
NEW_TOKENS = 192  # per sequence of a peer
CHUNK = 4096  # prompt tokens per step: large, so that all sequences soon decode together
BUSY_S, CLIENTS, THINK_S = 60.0, 64, 0.05
LONG = 2048
BESIDE = 16
STEPS = 32  # a step's time is the median of so many
FILLING_STEPS = 96  # steps that the first sequence may decode until the last prompt has been computed
SETTLED = 700  # decode steps until the CUDA graph of every batch size has been captured
KV_SHARE = 0.93  # of the GPU's memory, for weights and KV cache together
PEER_TIMEOUT_S = 300.0

Fields = dict[str, Any]
"""What a part measures of a shape."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes per second (read and written), and floating-point operations per second."""

    copy: float
    gemm: float


def measure_limits() -> Limits:
    """Measure this GPU."""
    import torch

    limits = Limits(_copy_rate(), _gemm_rate())
    torch.cuda.empty_cache()
    return limits


def _copy_rate() -> float:
    import torch

    flat = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(flat)
    return 2 * flat.nbytes / _best(lambda: other.copy_(flat))


def _gemm_rate() -> float:
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return float(2 * 8192**3 / _best(lambda: a @ b))


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of ten runs, by the device's clock."""
    import torch

    seconds = []
    for _ in range(10):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        seconds.append(began.elapsed_time(ended) / 1e3)
    return min(seconds)


class Bench:
    """One engine, and the measurements of it."""

    def __init__(self, engine: Engine, shape: Shape) -> None:
        self._engine, self._shape, self._count = engine, shape, 0

    def requests(self, count: int, length: int, tokens: int) -> list[Request]:
        """Random prompts."""
        greedy, made = SamplingParams(temperature=0), []
        for ids in prompts(count, length, self._shape.vocab, self._count):
            self._count += 1
            made.append(Request(str(self._count), tuple(ids), greedy, tokens, ignore_eos=True))
        return made

    def submit(self, count: int, length: int, tokens: int) -> list[str]:
        """Queue random prompts."""
        made = self.requests(count, length, tokens)
        for request in made:
            self._engine.submit(request)
        return [request.id for request in made]

    def drain(self) -> None:
        """Run until nothing is left."""
        while self._engine.busy:
            self._engine.step()

    def decode_step_s(self, count: int, length: int) -> float:
        """The median time of a step in which all of `count` sequences of about `length` tokens decode."""
        names = self.submit(count, length - STEPS, FILLING_STEPS + 2 * STEPS)
        begun: set[str] = set()
        while len(begun) < count:
            begun |= {delta.id for delta in self._engine.step()}
        self._engine.step()  # this step may have been launched before the last sequence began to decode
        median = self._step_s(count)
        for name in names:
            self._engine.cancel(name)
        self.drain()
        return median

    def first_token_s(self) -> float:
        """The median time to the first token of a long prompt."""
        times = []
        for request in self.requests(5, LONG, 1):
            began = time.perf_counter()
            self._engine.submit(request)
            self.drain()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def longest_gap(self) -> float:
        """The longest gap of BESIDE decodes while a long prompt is computed, in median steps without it."""
        names = self.submit(BESIDE, 128, 2000)
        for _ in range(4 * STEPS):
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
        """CLIENTS clients each send one request after another, of mixed lengths.

        Returns the driver's mean utilisation of the GPU, and tokens per second.
        """
        rng, samples, tokens = random.Random(0), list[float](), 0
        began = time.perf_counter()
        end, sampled = began + seconds, began
        arrivals = [began + rng.expovariate(1 / THINK_S) for _ in range(CLIENTS)]
        while (now := time.perf_counter()) < end:
            due = [at for at in arrivals if at <= now]
            arrivals = [at for at in arrivals if at > now]
            for _ in due:
                length = min(LONG, int(rng.lognormvariate(5.5, 1.0)) + 1)
                self.submit(1, length, min(512, int(rng.lognormvariate(4.8, 0.8)) + 1))
            for delta in self._engine.step() if self._engine.busy else ():
                tokens += len(delta.token_ids)
                if delta.finish:
                    arrivals.append(now + rng.expovariate(1 / THINK_S))
            if now > sampled + 0.2:
                samples.append(utilisation())
                sampled = now
        took = time.perf_counter() - began
        self.drain()
        return statistics.mean(samples), tokens / took

    def _step_s(self, tokens: int = 0) -> float:
        """The median time of the next steps. Each must yield `tokens` tokens, unless that is 0."""
        times = []
        for _ in range(STEPS):
            began = time.perf_counter()
            deltas = self._engine.step()
            times.append(time.perf_counter() - began)
            if tokens and len(deltas) != tokens:
                raise RuntimeError(f"a step brought {len(deltas)} tokens, not {tokens}: nothing was measured")
        return statistics.median(times)


@contextmanager
def engine_of(shape: Shape, quantization: str, **options: Any) -> Iterator[tuple[Bench, int]]:
    """An engine that has captured the CUDA graphs of all batch sizes, and the bytes of its KV cache."""
    import torch

    _, memory = torch.cuda.mem_get_info()
    kv_bytes = int(memory * KV_SHARE) - shape.parameters * (1 if quantization else 2)
    options |= {"dtype": "bfloat16", "load_format": "dummy", "kv_bytes": kv_bytes}
    options |= {"quantization": quantization, "max_model_len": 4096, "max_running": 256}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_json(shape)))
        began = time.perf_counter()
        with Engine(folder, device="cuda", **options) as engine:
            print(f"  loaded in {time.perf_counter() - began:.0f} s", flush=True)
            bench = Bench(engine, shape)
            bench.submit(1, 16, SETTLED)
            bench.drain()
            gc.collect()
            gc.freeze()  # as an engine's process does; otherwise a garbage collection looks like a gap
            try:
                yield bench, kv_bytes
            finally:
                gc.unfreeze()


def decode(shape: Shape, limits: Limits, quantization: str) -> Iterator[Fields]:
    """Tokens per second of the batches that fit into the KV cache, and what the limits allow."""
    points: list[Fields] = []
    skipped: list[str] = []
    # Large prompt chunks even beside decodes: all sequences must decode before the first has ended.
    chunks = {"max_batch_tokens": CHUNK + 256, "max_prefill_tokens": CHUNK}
    with engine_of(shape, quantization, **chunks) as (bench, kv_bytes):
        for count, length in POINTS:
            if count * (length + STEPS) * shape.kv_bytes_per_token > kv_bytes:
                skipped.append(f"{count} x {length}: its keys and values do not fit")
            else:
                step_s = bench.decode_step_s(count, length)
                points.append(held_against(shape, limits, quantization, count, length, step_s))
                print("  " + _said(points[-1]), flush=True)
            yield {"decode": points, "skipped": skipped}


def held_against(
    shape: Shape, limits: Limits, quantization: str, count: int, length: int, step_s: float
) -> Fields:
    """The time of a decode step, what it had to read and compute, and its shares of the limits."""
    weight_bytes = shape.step_parameters * (1 if quantization else 2)
    kv_bytes = count * length * shape.kv_bytes_per_token
    flops = 2 * shape.step_parameters * count
    least_s = max(weight_bytes / limits.copy, flops / limits.gemm) + kv_bytes / limits.copy
    return {
        "sequences": count,
        "length": length,
        "tokens_per_s": count / step_s,
        "step_s": step_s,
        "weight_bytes": weight_bytes,
        "kv_bytes": kv_bytes,
        "product_flops": flops,
        "of_copy": (weight_bytes + kv_bytes) / step_s / limits.copy,
        "of_both_limits": least_s / step_s,
    }


def serve(shape: Shape, limits: Limits, quantization: str) -> Iterator[Fields]:
    """Time to first token, gaps, and a minute of mixed arrivals, with the engine's default settings."""
    utilisation = driver_utilisation()
    with engine_of(shape, quantization) as (bench, _):
        first_s = bench.first_token_s()
        of_gemm = shape.prefill_flops([LONG]) / first_s / limits.gemm
        print(f"  first token of {LONG}: {first_s * 1e3:.0f} ms, {of_gemm:.0%} of the GEMM limit", flush=True)
        yield {"first_token_s": first_s, "first_token_of_gemm": of_gemm}
        gap = bench.longest_gap()
        print(f"  longest gap beside it: {gap:.1f} median steps", flush=True)
        yield {"gap_over_median_step": gap}
        busy, rate = bench.busy(BUSY_S, utilisation)
        print(f"  busy under mixed arrivals: {busy:.0%}, {rate:.0f} tokens/s", flush=True)
        yield {"busy": busy, "busy_tokens_per_s": rate}


def _said(fields: Fields) -> str:
    def text(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {text(value)}" for name, value in fields.items())


def driver_utilisation() -> Callable[[], float]:
    """A function that asks the driver for the GPU's utilisation; it returns NaN where NVML is missing.

    Utilisation is the share of the driver's last sampling period in which a kernel ran.
    """
    import torch

    try:
        import pynvml
    except ModuleNotFoundError as error:
        print(f"  NVML: {error}")
        return lambda: math.nan
    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    except pynvml.NVMLError as error:
        print(f"  NVML: {error}")
        return lambda: math.nan
    return lambda: pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100


def peers(
    shape: Shape, names: Sequence[str], points: Sequence[tuple[int, int]], device: str, logs: Path
) -> Iterator[Fields]:
    """How fast other engines decode, each point in a new process; or why a point failed.

    In the middle of its new tokens, a sequence is as long as ours are in the middle of the measured steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_json(shape)))
        for name in names:
            for count, length in points:
                point: Fields = {"name": name, "sequences": count, "length": length}
                setup = Setup(
                    folder,
                    device=device,
                    random_weights=True,
                    max_running=count,
                    max_batch_tokens=CHUNK + count,
                )
                begin = max(1, length - NEW_TOKENS // 2)
                work = Work(prompts(count, begin, shape.vocab, "peers"), [NEW_TOKENS] * count)
                try:
                    with contest([Entry(name)], setup, "", logs, PEER_TIMEOUT_S) as (peer,):
                        peer.run(work, PEER_TIMEOUT_S)  # the first run compiles
                        point["tokens_per_s"] = median_decode_rate(peer.run(work, PEER_TIMEOUT_S))
                        point["what"] = peer.ready.details
                except ContestantError as error:
                    point["failed"] = str(error)
                print("  " + _said(point), flush=True)
                yield {"peers": [point]}


def times_of_peers(result: Fields) -> Fields:
    """Our tokens per second divided by each peer's, at the points that both have."""
    ours = {(p["sequences"], p["length"]): p["tokens_per_s"] for p in result.get("decode", ())}
    return {
        f"{peer['name']}, {peer['sequences']} x {peer['length']}": ours[at] / peer["tokens_per_s"]
        for peer in result.get("peers", ())
        if (at := (peer["sequences"], peer["length"])) in ours and "tokens_per_s" in peer
    }


class Report:
    """A JSON file and a plot, written after each result. Results of another GPU are not kept."""

    def __init__(self, path: Path, gpu: str, limits: Limits) -> None:
        old: Fields = json.loads(path.read_text()) if path.exists() else {}
        self._path = path
        self._content: Fields = {
            "gpu": gpu,
            "results": old.get("results", []) if old.get("gpu") == gpu else [],
        }
        self._limits = asdict(limits)

    def add(self, shape: str, quantization: str, fields: Fields) -> Fields:
        """Add a result to the report; returns all results of the shape."""
        results: list[Fields] = self._content["results"]
        key = {"shape": shape, "quantization": quantization}
        result = next((one for one in results if key.items() <= one.items()), None)
        if result is None:
            results.append(result := key)
        # Peers arrive one by one. Each replaces the earlier result of the same peer and point.
        peers = {(peer["name"], peer["sequences"], peer["length"]): peer for peer in result.get("peers", ())}
        peers |= {(peer["name"], peer["sequences"], peer["length"]): peer for peer in fields.get("peers", ())}
        result |= fields | ({"peers": list(peers.values())} if peers else {})
        result["times_of_peers"] = times_of_peers(result)
        # Keep the limits beside the results that were compared with them.
        measured = asdict(Stamp.now()) | {"limits": self._limits}
        result.setdefault("measured", {}).update(dict.fromkeys(fields, measured))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._content, indent=1) + "\n")
        gpu_plot.draw(results, self._path.with_suffix(".svg"))
        return result


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=GPU_SHAPES, default=list(GPU_SHAPES))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--quantization", default="", choices=("", "int8", "fp8"))
    parser.add_argument("--report", type=Path, default=Path("docs/bench/gpu.json"))
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: nothing was measured")
    driver_utilisation()  # prints now if NVML is missing
    limits = measure_limits()
    name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    rates = f"copy {limits.copy / 1e12:.2f} TB/s, GEMM {limits.gemm / 1e12:.0f} TFLOP/s"
    print(f"{name}: {rates}", flush=True)
    report = Report(options.report, name, limits)
    failed = False
    for shape, part in product((GPU_SHAPES[name] for name in options.shapes), options.only):
        print(f"{shape.name}, {part}", flush=True)
        try:
            known = run(part, shape, limits, report, options)
        except (RuntimeError, EngineError):  # run the other parts all the same
            traceback.print_exc()
            failed = True
        else:
            print(f"  times of peers: {_said(known.get('times_of_peers', {}))}", flush=True)
        gc.collect()  # frees the engine of this part
        torch.cuda.empty_cache()
    sys.exit(failed)


def run(part: str, shape: Shape, limits: Limits, report: Report, options: argparse.Namespace) -> Fields:
    """Run one part for one shape; returns all results of the shape."""
    known: Fields = {}
    if part != "peers":
        found = {"decode": decode, "serve": serve}[part](shape, limits, options.quantization)
    elif options.quantization:
        return known  # peers run without quantisation only
    else:
        found = peers(shape, options.peers, BESIDE_POINTS, "cuda", CACHE / "logs")
    for fields in found:
        known = report.add(shape.name, options.quantization, fields)
    return known


if __name__ == "__main__":
    main()
