"""One rank's execution of plans: forward, then sample.

Owns: the order of plans on this rank, the model, the KV cache. Does not own: any decision; the plans contain
them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from engine.config import BLOCK_SIZE, EngineConfig
from engine.distributed.parallel import Parallel
from engine.errors import EngineError
from engine.execution.decoder import Decoder
from engine.execution.step_input import StepInput, StepInputBuilder, StepTensors
from engine.kernels.interface import Kernels, KVCache
from engine.kernels.sample import SampleSpec
from engine.plan import PromptLogprobs, StepPlan
from engine.sampling.logprobs import score_prompts
from engine.sampling.sampler import PendingSample, Sampler
from engine.weights.model_config import ModelConfig
from engine.weights.stage_weights import StageWeights

if TYPE_CHECKING:
    from engine.execution.cuda_graphs import Capture, DecodeGraphs


class _ForwardOutput(NamedTuple):
    """The results of the last stage."""

    logits_SV: torch.Tensor | None  # float32, of the rows that sample; None if no row does
    ids_S: torch.Tensor | None = None  # sampled by a CUDA graph, which has stored them in the slot tensors
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    tensors: StepTensors | None = None  # the step's input; None if a CUDA graph ran it


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
        capture: Capture | None = None,
    ) -> None:
        """With `capture`, which needs a model of one stage, decode steps are captured in CUDA graphs."""
        self._epoch = engine.epoch
        self._step = 0
        self._parallel = parallel
        self._hidden_size = config.hidden_size
        self._dtype, self._device = kernels.activation_dtype, kernels.device
        self._cache = cache
        self._samples = parallel.grid.rank == parallel.grid.sampling_rank
        self._sampler = Sampler(kernels.sample, kernels.device)
        blocks_per_sequence = -(-max_model_len // BLOCK_SIZE)
        self._inputs = StepInputBuilder(engine.max_running, blocks_per_sequence, kernels.device)
        self._model = Decoder(config, weights, parallel, kernels, cache, max_model_len)
        self._graphs: DecodeGraphs | None = None
        if capture is not None:
            from engine.execution.cuda_graphs import DecodeGraphs  # imports Triton

            max_sequences = min(engine.max_running, engine.batch_tokens)
            # A method of this object would make a reference cycle, which keeps weights and cache in memory
            # until the garbage collector runs.
            logits = partial(_decode_logits, self._model)
            self._graphs = DecodeGraphs(logits, self._inputs.slot_tensors, max_sequences, capture)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> PendingSample | None:
        """Start to execute a plan; returns its pending sample on the sampling rank, None on the others.

        Raises:
            EngineError: PLAN_REFUSED, when the plan is of another epoch or not the next one.
        """
        self._check_order(plan)
        step_input = self._inputs.build(plan)
        self._cache.copy_blocks(plan.copies)
        output = self._forward(step_input)
        return None if output is None else self._sample(plan, step_input.specs, output)

    def _check_order(self, plan: StepPlan) -> None:
        if (plan.epoch, plan.step) != (self._epoch, self._step + 1):
            raise EngineError(
                "PLAN_REFUSED",
                f"plan {plan.step} of epoch {plan.epoch}, expected {self._step + 1} of {self._epoch}",
            )
        self._step = plan.step

    def _forward(self, step_input: StepInput) -> _ForwardOutput | None:
        """Compute logits, by a CUDA graph if one fits; None on a stage that is not the last."""
        if self._graphs is not None:
            replayed = self._graphs.run(step_input)
            if replayed is not None:
                return _ForwardOutput(*replayed)
        tensors = self._inputs.to_tensors(step_input)
        x_TD = self._run_stage(tensors)
        if x_TD is None:
            return None
        prompt_logprobs = score_prompts(step_input.prompts, partial(self._model.logits, x_TD=x_TD))
        logits_SV = self._model.logits(tensors.sample_rows_S, x_TD) if step_input.specs else None
        return _ForwardOutput(logits_SV, None, prompt_logprobs, tensors)

    def _run_stage(self, tensors: StepTensors) -> torch.Tensor | None:
        """Run this stage. The last stage returns its hidden states [T, D], others send theirs to the next."""
        grid, x_TD = self._parallel.grid, None
        if not grid.is_first_stage:
            shape = (tensors.num_tokens, self._hidden_size)
            x_TD = self._parallel.recv_hidden(shape, self._dtype, self._device)
        x_TD = self._model.forward(tensors, x_TD)
        if grid.is_last_stage:
            return x_TD
        self._parallel.send_hidden(x_TD)
        return None

    def _sample(
        self, plan: StepPlan, specs: Sequence[SampleSpec], output: _ForwardOutput
    ) -> PendingSample | None:
        """Sample on the sampling rank; with `sample_on_device`, on all ranks of its stage."""
        logits_SV, ids_S, prompt_logprobs, tensors = output
        if plan.sample_on_device and logits_SV is not None and tensors is not None:
            # Each rank needs the ids on its own device: they are the pending tokens of the next step.
            ids_S = self._sampler.sample_on_device(logits_SV, specs)
            tensors.store_sampled(ids_S, self._inputs.slot_tensors)
        if not self._samples:
            return None
        return self._sampler.sample(plan, logits_SV, specs, ids_S, prompt_logprobs)


def _decode_logits(model: Decoder, tensors: StepTensors) -> torch.Tensor:
    """A step's logits of the rows that sample, for a model with one stage."""
    return model.logits(tensors.sample_rows_S, model.forward(tensors))
