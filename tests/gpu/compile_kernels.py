"""Compiles every kernel that an engine's steps launch, for a GPU that need not be in this machine.

Triton's interpreter accepts code that its compiler refuses: variables that change their type, branches with
different types, arguments that become constants because they are 1. So a model runs on the CPU here, and
each launch compiles the kernel for exactly its arguments instead of running it: the numbers are nonsense.
Runs as a process of its own, since Triton decides at its import whether it interprets. Prints JSON.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.shapes import Shape, config_json
from engine.config import EngineConfig
from engine.distributed.parallel import Parallel
from engine.execution.runner import Runner
from engine.grammar.service import GrammarService
from engine.grid import Grid
from engine.kernels.gpu import attention, gemv, rows, sample
from engine.kernels.gpu.kernels import GpuKernels
from engine.kernels.gpu.tuning import Tuner
from engine.processes.core import EngineCore
from engine.request import Request, SamplingParams
from engine.scheduling.limits import Limits
from engine.scheduling.scheduler import Scheduler
from engine.weights.loader import load_weights
from engine.weights.model_config import ModelConfig

CPU, BF16 = torch.device("cpu"), torch.bfloat16
PROCESSORS = 4  # few, so that a sequence's keys are split into few numbers of parts
MAX_SHARED = 227 << 10  # bytes of shared memory of a program on an H200
BLOCKS = 400
SHAPES = {
    "llama": (Shape("llama", 1024, 2, 8, 8, 2816, 32000, tied=False), {}),
    "mistral": (
        Shape("mistral", 1024, 2, 8, 2, 2816, 32000, tied=False),
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
    ),
    "qwen3": (
        Shape("qwen3", 1024, 2, 8, 2, 2816, 32000, tied=False),
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    ),
}


# By the number of rows of a product: every kind of choice that a tuner can make.
CHOSEN = dict(zip((1, 2, 4, 8, 16), (*gemv.CANDIDATES[3:6], None, gemv.CANDIDATES[9]), strict=True))


class Hopper:
    """Replaces CUDA's driver, and collects the compiled kernels."""

    def __init__(self) -> None:
        self.compiled: dict[str, str] = {}  # names by hash

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def keep(self, name: str, kernel: Any) -> None:
        """Add the kernel of a launch."""
        assert kernel.metadata.shared <= MAX_SHARED, (name, kernel.metadata.shared)
        self.compiled[kernel.hash] = name


def compile_only() -> Hopper:
    """Replace launches by compilation from now on."""
    hopper, real = Hopper(), JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        assert all(0 < size <= (1 << 31 if axis == 0 else 65535) for axis, size in enumerate(grid)), grid
        hopper.keep(self.__name__, real(self, *arguments, grid=grid, warmup=True, **named))
        if self is sample._sample:
            arguments[2].zero_()  # the sampled ids must be in the vocabulary

    driver.set_active(hopper)
    JITFunction.run = run
    return hopper


def core_of(
    shape: Shape, changes: dict[str, object], quantisation: str, running: int, longest: int, step: int
) -> EngineCore:
    """An engine of one rank for a GPU on which an earlier engine has measured the products."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_json(shape) | changes))
        config, grid = ModelConfig.load(folder), Grid(1, 1, 0)
        kernels = GpuKernels(CPU, BF16, quantisation)
        kernels._processors = PROCESSORS
        kernels._products.tuner = Tuner("none", None)
        kernels._products.tuner.choose = lambda shape, measure: CHOSEN[shape.m]  # type: ignore[method-assign]
        weights = load_weights(folder, config, grid, kernels, load_format="dummy")
        cache = kernels.cache(config.num_layers, config.num_kv_heads, config.head_dim, BLOCKS)
        engine = EngineConfig(folder, max_running=running, max_batch_tokens=step)
        runner = Runner(engine, config, weights, Parallel(grid), kernels, cache, longest)
        limits = Limits(
            config.vocab_size,
            longest,
            (),
            BLOCKS,
            max_batch_tokens=step,
            max_running=running,
            window=config.kv_window,
            async_scheduling=True,
        )
        return EngineCore(Scheduler(limits), runner, None, 0, GrammarService(folder, config.vocab_size, ()))


def run(core: EngineCore, sequences: int, length: int, tokens: int = 3) -> None:
    """Serve some requests to their end."""
    for number in range(sequences):
        prompt = tuple(range(1 + number, 1 + number + length))
        core.submit(Request(str(number), prompt, SamplingParams(), tokens, ignore_eos=True), 0.0)
    while core.busy:
        core.launch(0.0)
        core.collect(0.0)


def main() -> None:
    """Print how often each kernel is compiled, which are compiled after the warm-up, and which never."""
    hopper, late, every = compile_only(), list[str](), dict[str, str]()
    for name, quantisation, running, longest, step in (
        ("llama", "", 11, 512, 128),
        ("mistral", "", 11, 512, 512),
        ("qwen3", "", 1, 128, 512),
        ("llama", "int8", 4, 128, 512),
        ("llama", "fp8", 8, 512, 512),
    ):
        launched = hopper.compiled = {}
        core = core_of(*SHAPES[name], quantisation, running, longest, step)
        core.canary(0.0)
        core.warm_up(0.0, running, min(step, longest - 2), step)
        warmed_up = set(launched)
        for sequences, length in ((1, 100), (3, 16), (7, 33), (11, 40), (10, 5), (4, 110), (1, 12), (2, 3)):
            run(core, sequences, length)
        late += [f"{name} {quantisation}: {launched[one]}" for one in launched.keys() - warmed_up]
        every |= launched
    for tiles in gemv.CANDIDATES:
        for rows_of_x in (1, 16) if tiles.splits == 1 or tiles.rows == 64 else ():
            x, weight = torch.zeros(rows_of_x, 4096, dtype=BF16), torch.zeros(512, 4096, dtype=BF16)
            gemv.gemv(x, weight, weight[0], tiles)
    names = list((every | hopper.compiled).values())
    kernels = {
        one.__name__
        for module in (attention, gemv, rows, sample)
        for one in vars(module).values()
        if isinstance(one, JITFunction)
    }
    print(
        json.dumps(
            {
                "compiled": {name: names.count(name) for name in sorted(set(names))},
                "late": late,
                "not_launched": sorted(kernels - set(names)),
            }
        )
    )


if __name__ == "__main__":
    main()
