"""Samples the next token of every row of a step: logits processors, then temperature, truncation and noise.

Shapes: S rows, V vocabulary.

engine/sampling/logits_processors.py changes logits before sampling (penalties, bias, min_tokens, grammar).
engine/kernels/sample.py defines temperature, top-k, top-p, min-p and the noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.kernels.sample import SampleSpec
from engine.kernels.transfer import after_device, from_device
from engine.plan import PromptLogprobs, Sampled, StepPlan
from engine.sampling.logits_processors import LogitsProcessors
from engine.sampling.logprobs import log_probabilities

PendingSample = Callable[[], Sampled]
"""The sampled tokens of a step. The device may still compute them: the call waits for it."""
SampleTokens = Callable[[torch.Tensor, Sequence[SampleSpec]], torch.Tensor]  # logits [S, V] to ids [S]


class Sampler:
    """Samples for the plans of one epoch, in order.

    Owns: the logits processors, with the tokens that they depend on. Does not own: the model, the plans, the
    kernel that samples.
    """

    def __init__(self, sample_tokens: SampleTokens, device: torch.device) -> None:
        self._sample_tokens = sample_tokens
        self._device = device
        self._processors = LogitsProcessors()

    def sample_on_device(self, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        """Sample ids [S] that stay on the device, from rows that need no logits processor."""
        return self._sample_tokens(logits_SV, specs)

    def sample(
        self,
        plan: StepPlan,
        logits_SV: torch.Tensor | None,
        specs: Sequence[SampleSpec],
        ids_S: torch.Tensor | None = None,
        prompt_logprobs: tuple[PromptLogprobs, ...] = (),
    ) -> PendingSample:
        """Sample one token per row. Call this for every plan, in order.

        Args:
            plan: the step; its new and freed slots are applied first.
            logits_SV: float32; None if no row samples.
            specs: how each row is sampled.
            ids_S: tokens that the device has sampled from these logits already; None if it has not.
            prompt_logprobs: become part of the result.
        """
        self._processors.update_slots(plan)
        if logits_SV is None:
            sampled = Sampled(plan.step, (), (), prompt_logprobs)
            # Wait for the device here too, else the recorded step time is the launch time.
            return after_device(self._device, lambda: sampled)
        if plan.sample_on_device:  # such a plan has no sequence with logits processors or log-probabilities
            assert ids_S is not None
            count, wait = len(ids_S), from_device(ids_S)
            return lambda: Sampled(plan.step, tuple(wait()), (None,) * count)
        rows = [(spec.slot, spec.position) for spec in specs]
        processed_SV = self._processors.apply(logits_SV, rows, plan.masks)
        if ids_S is None or processed_SV is not logits_SV:
            ids_S = self._sample_tokens(processed_SV, specs)
        token_ids = tuple(ids_S.tolist())
        for spec, token in zip(specs, token_ids, strict=True):
            self._processors.append_token(spec.slot, token)
        logprobs = log_probabilities(logits_SV, ids_S, [spec.logprobs for spec in specs])
        done = Sampled(plan.step, token_ids, logprobs, prompt_logprobs)
        return lambda: done
