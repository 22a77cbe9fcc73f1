"""Starts one rank. `start_rank` lists the steps of a start; each function below it is one step.

Imports torch only inside functions, so that a module which imports this one does not load torch.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.config import BLOCK_SIZE, EngineConfig
from engine.grid import Grid
from engine.processes.config_check import load_config
from engine.processes.kv_sizing import (
    KVSize,
    block_bytes,
    kv_heads_per_rank,
    kv_memory_bytes,
    size_kv_cache,
)
from engine.processes.replica_group import connect_collectives, join_group, open_group
from engine.weights.model_config import ModelConfig

if TYPE_CHECKING:
    import torch

    from engine.distributed.channel import PlanHub, PlanLink
    from engine.distributed.parallel import Parallel
    from engine.execution.cuda_graphs import Capture
    from engine.execution.runner import Runner
    from engine.kernels.interface import Kernels
    from engine.processes.core import EngineCore
    from engine.weights.stage_weights import StageWeights

_log = logging.getLogger(__name__)

# Limits.weight_tokens: for each byte that it reads, a CPU does 10 to 20 times less arithmetic than a GPU.
_CPU_WEIGHT_TOKENS = 16
_GPU_WEIGHT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class StartedRank:
    """A rank that is ready to run plans. Rank 0 has a core; every other rank has a link to rank 0's core."""

    config: ModelConfig
    max_model_len: int
    runner: Runner
    core: EngineCore | None
    plans: PlanLink | None
    parallel: Parallel


def start_rank(
    engine: EngineConfig,
    announce: Callable[[str], None],
    meet: Callable[[], str],
    progress: Callable[[float], None],
    check: Callable[[], None] = lambda: None,
) -> StartedRank:
    """Start this rank and join it to its replica; rank 0 also runs a first step through all ranks.

    Args:
        engine: this rank's configuration.
        announce: rank 0 calls it before loading, with the address where the ranks meet.
        meet: the other ranks call it after loading; it waits for that address.
        progress: called with the loaded fraction of the weights, 0 to 1.
        check: rank 0 calls it repeatedly while it waits for the others; it raises if one of them has failed.

    Raises:
        ModelError: the model or the layout cannot be served.
        EngineError: another rank has gone.
    """
    config = load_config(engine)
    kernels = choose_kernels(engine)
    with ExitStack() as undo:
        store, hub = open_group(engine, announce, undo)
        weights = load_stage(engine, config, kernels, progress)
        plans = None
        if engine.rank != 0:
            store, plans = join_group(engine, meet)
        if hub is not None:
            hub.gather(check)  # before any collective: a collective would wait for a dead rank for ever
        parallel = connect_collectives(engine, config, kernels, store)
        async_steps = can_run_async(config, parallel, kernels)
        size = agree_on_kv_size(engine, config, parallel, kernels, async_steps=async_steps)
        runner = build_runner(engine, config, weights, parallel, kernels, size, async_steps=async_steps)
        if engine.rank != 0:
            return StartedRank(config, size.max_model_len, runner, None, plans, parallel)
        core = build_core(engine, config, runner, hub, size, async_steps=async_steps)
        warm_up(core, engine, kernels, size)
        undo.pop_all()
        return StartedRank(config, size.max_model_len, runner, core, None, parallel)


def choose_kernels(engine: EngineConfig) -> Kernels:
    """The fastest kernels for the rank's device; sets torch's device and number of threads."""
    import torch

    from engine.kernels import choose

    device = torch.device(engine.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = getattr(torch, engine.dtype_name)
    kernels = choose.choose_kernels(device, dtype, engine.quantization, threads=thread_count(engine))
    torch.set_num_threads(kernels.torch_threads)
    _log.info("rank %d of %d: %s kernels", engine.rank, engine.tp * engine.pp, kernels.name)
    return kernels


def thread_count(engine: EngineConfig) -> int:
    """Threads of a rank: `engine.threads`, else OMP_NUM_THREADS, else its share of the cores."""
    cores = len(os.sched_getaffinity(0))
    asked = engine.threads or int(os.environ.get("OMP_NUM_THREADS", 0))
    return max(1, asked or cores // (engine.tp * engine.pp))


def load_stage(
    engine: EngineConfig, config: ModelConfig, kernels: Kernels, progress: Callable[[float], None]
) -> StageWeights:
    """Load this rank's slices of its stage's weights."""
    from engine.weights.loader import load_weights

    return load_weights(
        engine.model,
        config,
        Grid(engine.tp, engine.pp, engine.rank),
        kernels,
        progress,
        load_format=engine.load_format,
        check=engine.check_weights,
    )


def can_run_async(config: ModelConfig, parallel: Parallel, kernels: Kernels) -> bool:
    """Whether a launched decode step never waits for the host.

    If so, a CUDA graph can capture it, and the next step can be scheduled while it runs. It does wait where
    experts are chosen on the host, where ranks that share a GPU communicate through the host, and where
    pipeline stages wait for each other.
    """
    has_experts = any(layer.moe for layer in config.layers)
    return kernels.capturable and not has_experts and parallel.grid.pp == 1 and parallel.capturable


def agree_on_kv_size(
    engine: EngineConfig, config: ModelConfig, parallel: Parallel, kernels: Kernels, *, async_steps: bool
) -> KVSize:
    """Size the KV cache for the rank with the least memory: a plan may use any block of rank 0's pool."""
    free_gpu_bytes = _free_gpu_bytes() if kernels.device.type == "cuda" else 0
    memory = kv_memory_bytes(engine, parallel.ranks_on_device, free_gpu_bytes)
    per_block = block_bytes(config, engine.tp, engine.pp, _dtype(engine).itemsize)
    max_blocks = parallel.min_over_ranks(memory // per_block)
    tokens_in_flight = engine.batch_tokens * (2 if async_steps else 1)
    size = size_kv_cache(engine, config, max_blocks, tokens_in_flight)
    # Again, because ranks may have been started with different `max_running`.
    return KVSize(parallel.min_over_ranks(size.num_blocks), size.max_model_len)


def _free_gpu_bytes() -> int:
    import torch

    return torch.cuda.mem_get_info()[0]


def _dtype(engine: EngineConfig) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, engine.dtype_name)
    return dtype


def build_runner(
    engine: EngineConfig,
    config: ModelConfig,
    weights: StageWeights,
    parallel: Parallel,
    kernels: Kernels,
    size: KVSize,
    *,
    async_steps: bool,
) -> Runner:
    """Allocate the KV cache and build the runner. With `async_steps`, a GPU uses CUDA graphs."""
    from engine.execution.runner import Runner

    kv_heads = kv_heads_per_rank(config, engine.tp)
    cache = kernels.cache(len(weights.layers), kv_heads, config.head_dim, size.num_blocks)
    kernels.warm()
    capture = _cuda_graph_capture() if async_steps and kernels.device.type == "cuda" else None
    return Runner(engine, config, weights, parallel, kernels, cache, size.max_model_len, capture)


def _cuda_graph_capture() -> Capture:
    from engine.execution.cuda_graphs import CudaGraphCapture  # imports Triton

    return CudaGraphCapture()


def build_core(
    engine: EngineConfig,
    config: ModelConfig,
    runner: Runner,
    hub: PlanHub | None,
    size: KVSize,
    *,
    async_steps: bool,
) -> EngineCore:
    """Rank 0's scheduler and core."""
    from engine.grammar.service import GrammarService
    from engine.processes.core import EngineCore
    from engine.scheduling.limits import Limits
    from engine.scheduling.scheduler import Scheduler

    limits = Limits(
        vocab_size=config.vocab_size,
        max_model_len=size.max_model_len,
        eos_token_ids=config.eos_token_ids,
        kv_blocks=size.num_blocks,
        block_size=BLOCK_SIZE,
        max_batch_tokens=engine.batch_tokens,
        max_running=engine.max_running,
        window=config.kv_window,
        prefix_cache=engine.prefix_cache,
        max_prefill_tokens=engine.max_prefill_tokens,
        weight_tokens=_CPU_WEIGHT_TOKENS if engine.device == "cpu" else _GPU_WEIGHT_TOKENS,
        async_scheduling=async_steps,
    )
    scheduler = Scheduler(limits, epoch=engine.epoch, depth=engine.pp)
    grammars = GrammarService(engine.model, config.vocab_size, config.eos_token_ids)
    sampling_rank = Grid(engine.tp, engine.pp, engine.rank).sampling_rank
    return EngineCore(scheduler, runner, hub, sampling_rank, grammars)


def warm_up(core: EngineCore, engine: EngineConfig, kernels: Kernels, size: KVSize) -> None:
    """Run the first steps now: communicators connect in them, and a GPU compiles its kernels."""
    core.canary(time.time())
    if kernels.device.type != "cuda":
        return
    max_prompt_len = min(engine.batch_tokens, size.max_model_len - 2)  # two tokens are sampled
    if max_prompt_len > 0:
        core.warm_up(time.time(), engine.max_running, max_prompt_len, engine.batch_tokens)
