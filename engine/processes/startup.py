"""Brings one rank up: weights, KV cache, groups, and on rank 0 the core.

Imports torch only where it is used, so that whoever reads this module's values need not.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.config import BLOCK_SIZE, DTYPES, LOAD_FORMATS, QUANTIZATIONS, EngineConfig
from engine.errors import ModelError
from engine.grid import Grid
from engine.scheduling.validation import blocks_per_sequence
from engine.weights.locate import check_weights
from engine.weights.model_config import ModelConfig, check_layout
from engine.weights.stages import stage_layers

if TYPE_CHECKING:
    from engine.distributed.channel import PlanLink
    from engine.distributed.parallel import Parallel
    from engine.execution.graphs import Record
    from engine.execution.runner import Runner
    from engine.kernels.interface import Kernels
    from engine.processes.core import EngineCore

_log = logging.getLogger(__name__)

_CPU_KV_BYTES = 1 << 30
_GPU_FREE_SHARE = 0.9
_CPU_WEIGHT_TOKENS = 16  # Limits.weight_tokens: arithmetic per byte read is 10 to 20 times less on a CPU
_GPU_WEIGHT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Member:
    """A rank that has joined its group. Rank 0 has a core, the others a link to it."""

    config: ModelConfig
    max_model_len: int
    runner: Runner
    core: EngineCore | None
    plans: PlanLink | None
    parallel: Parallel


def thread_count(engine: EngineConfig) -> int:
    """Threads of a rank: those asked for, else OMP_NUM_THREADS, else its share of the cores."""
    cores = len(os.sched_getaffinity(0))
    asked = engine.threads or int(os.environ.get("OMP_NUM_THREADS", 0))
    return max(1, asked or cores // (engine.tp * engine.pp))


def join(
    engine: EngineConfig,
    announce: Callable[[str], None],
    meet: Callable[[], str],
    progress: Callable[[float], None],
    check: Callable[[], None] = lambda: None,
) -> Member:
    """Load this rank and join the group; on rank 0, run a first step through all of it.

    Rank 0 calls `announce` with the address where the group meets before it loads; the others call
    `meet` for it once they have loaded. While rank 0 waits for the others it keeps calling `check`,
    which raises if one of them will never come.

    Raises:
        ModelError: the model or the layout cannot be served.
        EngineError: another rank has gone.
    """
    config = ModelConfig.load(engine.model, engine.max_model_len)
    check_layout(config, engine.tp, engine.pp)
    if engine.load_format not in LOAD_FORMATS:
        formats = ", ".join(LOAD_FORMATS)
        raise ModelError("INVALID_LAYOUT", f"load_format {engine.load_format} is not one of {formats}")
    if engine.load_format == "auto":
        check_weights(engine.model, engine.tp, engine.pp, engine.rank)  # before the seconds that torch takes
    if engine.dtype_name not in DTYPES:
        raise ModelError("INVALID_LAYOUT", f"dtype {engine.dtype} is not one of {', '.join(DTYPES)}")
    if engine.quantization not in QUANTIZATIONS:
        raise ModelError(
            "INVALID_LAYOUT",
            f"quantization {engine.quantization} is not one of {', '.join(filter(None, QUANTIZATIONS))}",
        )
    import torch

    from engine.distributed.channel import PlanHub, PlanLink
    from engine.distributed.rendezvous import connect, join_store, open_store
    from engine.execution.runner import Runner
    from engine.kernels.choose import choose_kernels
    from engine.weights.loader import load_weights

    grid = Grid(engine.tp, engine.pp, engine.rank)
    device, dtype = torch.device(engine.device), getattr(torch, engine.dtype_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    kernels = choose_kernels(device, dtype, engine.quantization, threads=thread_count(engine))
    torch.set_num_threads(kernels.torch_threads)
    _log.info("rank %d of %d: %s kernels", grid.rank, grid.world, kernels.name)
    with ExitStack() as undo:
        store = hub = link = None
        if grid.world > 1 and grid.rank == 0:
            store, address = open_store(engine.host)
            hub = PlanHub(engine.host, grid.world, engine.epoch)
            undo.callback(hub.close)
            store.set("plans", hub.address)
            announce(address)
        weights = load_weights(
            engine.model,
            config,
            grid,
            kernels,
            progress,
            load_format=engine.load_format,
            check=engine.check_weights,
        )
        if grid.rank != 0:
            store = join_store(meet())
            link = PlanLink(store.get("plans").decode(), engine.epoch, grid.rank)
        if hub is not None:
            hub.gather(check)  # before any collective, which would wait for a dead rank
        hidden_bytes = engine.batch_tokens * config.hidden_size * kernels.activation_dtype.itemsize
        parallel = connect(grid, store, engine.host, device, hidden_bytes)
        layers = max(
            len(stage_layers(config, Grid(engine.tp, engine.pp, rank))) for rank in range(grid.world)
        )
        kv_heads = max(1, config.num_kv_heads // engine.tp)
        block_bytes = 2 * layers * kv_heads * config.head_dim * dtype.itemsize * BLOCK_SIZE
        alone = _device_works_alone(config, parallel, kernels)
        blocks, max_model_len = _size_cache(
            engine,
            config,
            parallel.min_over_ranks(_kv_bytes(engine, parallel.ranks_on_device) // block_bytes),
            in_flight=engine.batch_tokens * (2 if alone else 1),
        )
        blocks = parallel.min_over_ranks(blocks)  # plans name blocks: no rank may have fewer than rank 0
        cache = kernels.cache(len(weights.layers), kv_heads, config.head_dim, blocks)
        kernels.warm()
        record = _recorder() if alone and kernels.device.type == "cuda" else None
        runner = Runner(engine, config, weights, parallel, kernels, cache, max_model_len, record)
        if grid.rank != 0:
            return Member(config, max_model_len, runner, None, link, parallel)
        core = _core(engine, config, runner, hub, grid.sampler, blocks, max_model_len, ahead=alone)
        core.canary(time.time())  # communicators are built now, not under the first request
        if kernels.device.type == "cuda":
            longest = min(engine.batch_tokens, max_model_len - 2)  # two tokens are drawn
            if longest > 0:
                core.rehearse(time.time(), engine.max_running, longest, engine.batch_tokens)
        undo.pop_all()
        return Member(config, max_model_len, runner, core, None, parallel)


def _device_works_alone(config: ModelConfig, parallel: Parallel, kernels: Kernels) -> bool:
    """Whether a step, once launched, never waits for the host: it can be recorded, and the next be planned.

    Experts are chosen on the host, ranks that share a GPU speak through it, and stages wait for each other.
    """
    experts = any(layer.moe for layer in config.layers)
    return kernels.recordable and not experts and parallel.grid.pp == 1 and parallel.capturable


def _recorder() -> Record:
    from engine.execution.graphs import CudaRecorder  # imports Triton

    return CudaRecorder()


def _kv_bytes(engine: EngineConfig, sharers: int) -> int:
    """KV memory of this rank, when `sharers` ranks of its group, itself included, share its GPU."""
    if engine.kv_bytes:
        return engine.kv_bytes
    if engine.device == "cpu":
        return _CPU_KV_BYTES
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free * _GPU_FREE_SHARE) // sharers


def _size_cache(engine: EngineConfig, config: ModelConfig, most: int, in_flight: int) -> tuple[int, int]:
    """Blocks of the pool and the longest sequence, when `most` blocks fit into memory.

    `in_flight`: tokens that a sequence may have in plans in flight.
    """
    longest = engine.max_model_len or config.max_position
    if longest > config.max_position:
        why = ""
        if config.rope.kind == "dynamic":
            why = "; beyond, dynamic rotary embedding follows the sequence's length, and no replay is exact"
        raise ModelError(
            "INVALID_LAYOUT",
            f"max_model_len {longest} exceeds the model's {config.max_position} positions{why}",
        )
    needed = blocks_per_sequence(longest, config.kv_window, in_flight, BLOCK_SIZE)
    if most < needed:
        if engine.max_model_len or most == 0:
            raise ModelError(
                "INVALID_LAYOUT",
                f"the KV memory holds {most * BLOCK_SIZE} tokens, fewer than max_model_len {longest}",
            )
        longest, needed = most * BLOCK_SIZE, most
    return min(most, needed * engine.max_running), longest


def _core(
    engine: EngineConfig,
    config: ModelConfig,
    runner: Runner,
    hub: object,
    sampler: int,
    blocks: int,
    max_model_len: int,
    *,
    ahead: bool,
) -> EngineCore:
    from engine.distributed.channel import PlanHub
    from engine.grammar.service import GrammarService
    from engine.processes.core import EngineCore
    from engine.scheduling.scheduler import Scheduler
    from engine.scheduling.validation import Limits

    limits = Limits(
        config.vocab_size,
        max_model_len,
        config.eos_token_ids,
        blocks,
        BLOCK_SIZE,
        engine.batch_tokens,
        engine.max_running,
        config.kv_window,
        engine.prefix_cache,
        engine.max_prefill_tokens,
        _CPU_WEIGHT_TOKENS if engine.device == "cpu" else _GPU_WEIGHT_TOKENS,
        ahead,
    )
    assert hub is None or isinstance(hub, PlanHub)
    grammars = GrammarService(engine.model, config.vocab_size, config.eos_token_ids)
    return EngineCore(Scheduler(limits, epoch=engine.epoch, depth=engine.pp), runner, hub, sampler, grammars)
