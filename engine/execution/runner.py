"""One rank's execution of plans.

Owns: the order of plans on this rank, the model, the cache. Does not own: what is in a plan.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from engine.config import BLOCK_SIZE, EngineConfig
from engine.distributed.parallel import Parallel
from engine.errors import EngineError
from engine.execution.batch import Batch, Batcher
from engine.execution.decoder import Decoder
from engine.kernels.interface import Kernels, KVCache
from engine.kernels.transfer import once_done
from engine.plan import StepPlan
from engine.sampling.sampler import Drawn, Sampler, score_prompts
from engine.weights.model_config import ModelConfig
from engine.weights.stage_weights import StageWeights

if TYPE_CHECKING:
    from engine.execution.graphs import DecodeGraphs, Record


class Runner:
    """Runs every plan of one epoch, in order."""

    def __init__(
        self,
        engine: EngineConfig,
        config: ModelConfig,
        weights: StageWeights,
        parallel: Parallel,
        kernels: Kernels,
        cache: KVCache,
        max_model_len: int,
        record: Record | None = None,
    ) -> None:
        """With `record`, decode steps are recorded and repeated; the model must have one stage then."""
        self._epoch = engine.epoch
        self._step = 0
        self._parallel = parallel
        self._hidden_size = config.hidden_size
        self._dtype, self._device = kernels.activation_dtype, kernels.device
        self._cache, self._kernels = cache, kernels
        self._sampler = Sampler(kernels.draw)
        self._batcher = Batcher(engine.max_running, -(-max_model_len // BLOCK_SIZE), kernels.device)
        self._model = Decoder(config, weights, parallel, kernels, cache, max_model_len)
        self._graphs: DecodeGraphs | None = None
        if record is not None:
            from engine.execution.graphs import DecodeGraphs  # imports Triton

            most = min(engine.max_running, engine.batch_tokens)
            # Not a method of this: a cycle would keep weights and cache until they are collected.
            logits = partial(_decode_logits, self._model)
            self._graphs = DecodeGraphs(logits, self._batcher.known, most, record)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Drawn | None:
        """Start to execute a plan; the rank that samples returns what is being drawn, the others None.

        Raises:
            EngineError: PLAN_REFUSED, when the plan is of another epoch or not the next one.
        """
        if (plan.epoch, plan.step) != (self._epoch, self._step + 1):
            raise EngineError(
                "PLAN_REFUSED",
                f"plan {plan.step} of epoch {plan.epoch}, expected {self._step + 1} of {self._epoch}",
            )
        self._step = plan.step
        grid = self._parallel.grid
        layout = self._batcher.read(plan)
        self._cache.copy_blocks(plan.copies)
        logits_SV: torch.Tensor | None
        ids_S: torch.Tensor | None
        logits_SV, ids_S = (None, None) if self._graphs is None else self._graphs.run(layout)
        if logits_SV is not None:
            if grid.rank != grid.sampler:
                return None
            self._sampler.follow(plan)
            return self._sampler.sample(plan, logits_SV, layout.draws, ids_S)
        batch = self._batcher.batch(layout)
        x_TD = None
        if not grid.is_first_stage:
            x_TD = self._parallel.recv_hidden((batch.tokens, self._hidden_size), self._dtype, self._device)
        x_TD = self._model.forward(batch, x_TD)
        if not grid.is_last_stage:
            self._parallel.send_hidden(x_TD)
            return None
        prompt_logprobs = score_prompts(batch.prompts, lambda rows_S: self._model.logits(rows_S, x_TD))
        logits_SV = self._model.logits(batch.sample_rows_S, x_TD) if batch.draws else None
        if plan.sample_on_device and logits_SV is not None:
            ids_S = self._kernels.draw(logits_SV, batch.draws)
            batch.keep(ids_S, self._batcher.known)
        if grid.rank != grid.sampler:
            return None
        self._sampler.follow(plan)
        drawn = self._sampler.sample(plan, logits_SV, batch.draws, ids_S, prompt_logprobs)
        # A step that draws nothing takes its time, too: or the host ran on, and a watchdog learnt from it.
        return drawn if logits_SV is not None else once_done(self._device, drawn)


def _decode_logits(model: Decoder, batch: Batch) -> torch.Tensor:
    """Of a model that has one stage."""
    return model.logits(batch.sample_rows_S, model.forward(batch))
