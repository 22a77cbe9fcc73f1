"""where the time of a step goes: a timeline, and a table of stages and kernels with GB/s each

Runs decode steps of one batch (or, with --prefill, the step of a long prompt) under torch's profiler. Bytes
are the minimum that a stage must move: weights, activations in and out, keys and values of all sequences.
The timeline (trace.json) opens in ui.perfetto.dev or chrome://tracing. Under Nsight Systems the stages are
NVTX ranges: nsys profile -t cuda,nvtx python -m bench.profile --ranges-only (one profiler at a time).
Example: python -m bench.profile --shape llama-2-7b --batch 32 --length 1024
"""

from __future__ import annotations

import argparse
import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.annotated import PREFIX, Annotated
from bench.gpu import GPU_SHAPES
from bench.measures import prompts
from bench.shapes import SHAPES, config_json
from engine import Engine
from engine.kernels import choose as kernel_choice
from engine.request import Request, SamplingParams

_ALL = SHAPES | GPU_SHAPES
_LAUNCHES = {"cuda_runtime", "cuda_driver"}
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
OTHERS = "everything else"


@dataclass(frozen=True, slots=True)
class Line:
    """One stage, or one kernel within it. Times in seconds; `rate` in bytes per second, 0 where unknown."""

    stage: str
    kernel: str
    calls: int
    seconds: float
    share: float
    rate: float = 0.0


def lines(
    events: Iterable[Mapping[str, Any]], moved: Mapping[str, int], *, on_device: bool = False
) -> list[Line]:
    """The lines of the table, longest time first, from a trace in Chrome's format.

    A kernel belongs to the stage whose range contains its launch. On a CPU, the time of a stage is the time
    of its range.

    Args:
        events: with cat, name, ts and dur in microseconds, tid, and args with correlation.
        moved: bytes by stage.
        on_device: whether kernels ran on a GPU.

    Raises:
        ValueError: the trace has no kernels, though they ran on a GPU.
    """
    events = [event for event in events if "dur" in event]
    ranges: defaultdict[Any, list[tuple[float, float, str]]] = defaultdict(list)
    launches: dict[Any, Mapping[str, Any]] = {}
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX):
            stage = event["name"].removeprefix(PREFIX)
            ranges[event["tid"]].append((event["ts"], event["ts"] + event["dur"], stage))
        elif event.get("cat") in _LAUNCHES:
            launches[event.get("args", {}).get("correlation")] = event
    for of_thread in ranges.values():
        of_thread.sort()

    def stage_of(event: Mapping[str, Any]) -> str:
        launch = launches.get(event.get("args", {}).get("correlation"))
        if launch is None:
            return OTHERS
        mine = ranges.get(launch["tid"], [])
        index = bisect_right(mine, launch["ts"], key=lambda one: one[0]) - 1
        return mine[index][2] if index >= 0 and launch["ts"] <= mine[index][1] else OTHERS

    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _ON_DEVICE:
            times[stage_of(event), event["name"]].append(event["dur"] / 1e6)
    if on_device and not times:
        raise ValueError("the trace has no kernels: does another profiler have the GPU?")
    if not on_device:
        for of_thread in ranges.values():
            for began, ended, stage in of_thread:
                times[stage, ""].append((ended - began) / 1e6)
    total = sum(map(sum, times.values()))
    of_stage: defaultdict[str, float] = defaultdict(float)
    for (stage, _), seconds in times.items():
        of_stage[stage] += sum(seconds)
    found = [
        Line(
            stage,
            kernel,
            len(seconds),
            sum(seconds),
            sum(seconds) / total,
            # The bytes of a stage are not known per kernel: divide them by the time of the whole stage.
            moved.get(stage, 0) / of_stage[stage] if of_stage[stage] else 0.0,
        )
        for (stage, kernel), seconds in times.items()
    ]
    return sorted(found, key=lambda line: -line.seconds)


def table(found: Iterable[Line], most: int = 20) -> str:
    """The table as text."""
    rows = [f"{'stage':<34} {'calls':>6} {'ms':>9} {'share':>6} {'GB/s':>7}  kernel"]
    for line in list(found)[:most]:
        rate = f"{line.rate / 1e9:7.0f}" if line.rate else " " * 7
        start = f"{line.stage:<34} {line.calls:>6} {line.seconds * 1e3:9.2f} {line.share:6.1%}"
        rows.append(f"{start} {rate}  {line.kernel[:80]}".rstrip())
    return "\n".join(rows)


def profile(options: argparse.Namespace) -> list[Line]:
    """Run some steps under the profiler, write the trace, and return the lines of the table."""
    import torch

    shape = _ALL[options.shape]
    made: list[Annotated] = []
    real = kernel_choice.choose_kernels

    def choose(*arguments: Any, **named: Any) -> Annotated:
        made.append(Annotated(real(*arguments, **named)))
        return made[-1]

    on_gpu = options.device != "cpu"
    with tempfile.TemporaryDirectory() as folder, patch.object(kernel_choice, "choose_kernels", choose):
        (Path(folder) / "config.json").write_text(json.dumps(config_json(shape)))
        length, batch = options.length, 1 if options.prefill else options.batch
        settings: dict[str, Any] = {"dtype": options.dtype, "load_format": "dummy", "max_running": batch}
        settings |= {"quantization": options.quantization, "max_model_len": length + 8 * options.steps}
        settings["max_batch_tokens"] = batch * length  # all prompts in one step
        settings["kv_bytes"] = (batch + 1) * (settings["max_model_len"] + 64) * 2 * shape.kv_bytes_per_token
        with Engine(folder, device=options.device, progress=False, **settings) as engine:
            (kernels,) = made
            steps, tokens = (1, 1) if options.prefill else (options.steps, 4 * options.steps)

            def submit(seed: int) -> set[str]:
                names = set()
                for number, ids in enumerate(prompts(batch, length, shape.vocab, seed)):
                    names.add(f"{seed}-{number}")
                    sampling = SamplingParams(temperature=0)
                    engine.submit(Request(f"{seed}-{number}", tuple(ids), sampling, tokens, ignore_eos=True))
                return names

            waiting = submit(0)
            while waiting:  # until all decode; with --prefill this is the warm-up
                waiting -= {delta.id for delta in engine.step()}
            if options.prefill:
                submit(1)
            else:
                engine.step()  # the first step with decodes only: it compiles the kernels of such steps
            activities = [torch.profiler.ProfilerActivity.CPU]
            if on_gpu:
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.synchronize()
            kernels.counting = True
            profiler = None if options.ranges_only else torch.profiler.profile(activities=activities)
            with profiler or nullcontext():
                for _ in range(steps):
                    deltas = engine.step()
                    if len(deltas) != batch:
                        raise RuntimeError(f"a step brought {len(deltas)} tokens, not {batch}")
                if on_gpu:
                    torch.cuda.synchronize()
            kernels.counting = False
            if profiler is None:
                return []
            options.report.mkdir(parents=True, exist_ok=True)
            trace = options.report / "trace.json"
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
            return lines(events, kernels.bytes_by_stage(), on_device=on_gpu)


def main() -> None:
    """Profile and write."""
    import torch

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=_ALL, default="llama-2-7b" if gpu else "135m")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="")
    parser.add_argument("--batch", type=int, default=32 if gpu else 8, help="sequences that decode")
    parser.add_argument("--length", type=int, default=1024 if gpu else 128, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prefill", action="store_true", help="one prompt's step, not decode steps")
    parser.add_argument(
        "--ranges-only", action="store_true", help="for Nsight Systems: without torch's profiler"
    )
    parser.add_argument("--report", type=Path, default=Path(".phalanx/profile"))
    options = parser.parse_args()
    found = profile(options)
    if options.ranges_only:
        return
    text = table(found)
    print(text)
    (options.report / "table.txt").write_text(text + "\n")
    report = [asdict(line) for line in found]
    (options.report / "table.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {options.report}/trace.json, table.txt and table.json")


if __name__ == "__main__":
    main()
