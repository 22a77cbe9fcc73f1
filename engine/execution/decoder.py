"""One rank's part of the decoder, for every architecture.

Shapes: T tokens of a step, D hidden, H query heads, K KV heads, E head size, A = (H + 2 K) E, F MLP,
X experts, C experts per token, N tokens of one expert, V vocabulary, S rows that sample, P positions.
H, K, F and V are this rank's share.

Parallelism is in the lines that name `parallel`: the embedding, attention and the MLP each end in one sum
over the tensor parallel ranks. `Runner` passes `x_TD` from stage to stage.
"""

from __future__ import annotations

import torch

from engine.distributed.parallel import Parallel
from engine.execution.rope import rope_tables
from engine.execution.step_input import StepTensors
from engine.kernels.interface import Kernels, KVCache, Rope
from engine.weights.model_config import ModelConfig
from engine.weights.stage_weights import Mlp, Moe, StageWeights


class Decoder:
    """One rank's layers. Owns: the rotary tables. Does not own: weights, cache, groups."""

    def __init__(
        self,
        config: ModelConfig,
        weights: StageWeights,
        parallel: Parallel,
        kernels: Kernels,
        cache: KVCache,
        max_positions: int,
    ) -> None:
        self._config = config
        self._weights = weights
        self._parallel = parallel
        self._kernels = kernels
        self._cache = cache
        cos_PE, sin_PE = rope_tables(config.rope, config.head_dim, max_positions)
        self._rope = Rope(cos_PE.to(kernels.device), sin_PE.to(kernels.device))

    def forward(self, step: StepTensors, x_TD: torch.Tensor | None = None) -> torch.Tensor:
        """Run this stage's layers: [T, D] from the previous stage (None on the first) to [T, D]."""
        ops, eps, reduce = self._kernels, self._config.rms_eps, self._parallel.all_reduce
        if x_TD is None:
            x_TD = self._embed(step.token_ids_T)
        delta_TD = None
        for index, layer in enumerate(self._weights.layers):
            y_TD = ops.add_rms_norm(x_TD, delta_TD, layer.attention_norm, eps)
            qkv_TA = ops.linear(y_TD, layer.qkv.weight, layer.qkv.bias)
            y_TA = ops.attend(
                qkv_TA,
                self._cache,
                index,
                step.attention,
                self._rope,
                window=layer.window,
                norms=layer.head_norms,
            )
            delta_TD = reduce(ops.linear(y_TA, layer.out.weight, layer.out.bias))
            y_TD = ops.add_rms_norm(x_TD, delta_TD, layer.mlp_norm, eps)
            if isinstance(layer.mlp, Moe):
                delta_TD = reduce(self._moe(y_TD, layer.mlp))
            else:
                delta_TD = reduce(self._mlp(y_TD, layer.mlp))
        return x_TD if delta_TD is None else x_TD.add_(delta_TD)

    def logits(self, rows_S: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
        """The float32 logits [S, the model's vocabulary] of some rows of the last stage's `x_TD`."""
        assert self._weights.final_norm is not None
        assert self._weights.head is not None
        x_SD = x_TD[rows_S]
        x_SD = self._kernels.add_rms_norm(x_SD, None, self._weights.final_norm, self._config.rms_eps)
        logits_SV = self._parallel.gather_vocab(self._kernels.linear(x_SD, self._weights.head))
        return logits_SV[:, : self._config.vocab_size].float()

    def _mlp(self, y_TD: torch.Tensor, mlp: Mlp) -> torch.Tensor:
        y_TF = self._kernels.swiglu(y_TD, mlp.gate_up.weight, mlp.gate_up.bias)
        return self._kernels.linear(y_TF, mlp.down.weight, mlp.down.bias)

    def _moe(self, y_TD: torch.Tensor, moe: Moe) -> torch.Tensor:
        """This rank's share of the experts of every token, weighted and summed.

        A token's experts are added in the order of their numbers. So the sum does not depend on the experts
        of other tokens.
        """
        logits_TX = self._kernels.linear(y_TD, moe.router)
        weights_TC, experts_TC = route(logits_TX, moe.config.per_token, normalised=moe.config.normalised)
        order = experts_TC.flatten().argsort(stable=True)
        counts = experts_TC.flatten().bincount(minlength=moe.config.experts).tolist()
        sum_TD = torch.zeros_like(y_TD, dtype=torch.float32)
        for expert, choices in zip(moe.experts, torch.split(order, counts), strict=True):
            if not choices.shape[0]:
                continue
            rows = choices // moe.config.per_token
            delta_ND = self._mlp(y_TD[rows], expert)
            sum_TD[rows] += delta_ND.float() * weights_TC.flatten()[choices, None]
        return sum_TD.to(y_TD.dtype)

    def _embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        table = self._weights.embedding
        assert table is not None
        if self._parallel.grid.tp == 1:
            return self._kernels.embed(token_ids_T, table)
        rows = -(-self._config.vocab_size // self._parallel.grid.tp)
        local_T = token_ids_T - self._parallel.grid.tp_rank * rows
        is_local_T = (local_T >= 0) & (local_T < rows)
        x_TD = self._kernels.embed(local_T.clamp(0, rows - 1), table) * is_local_T[:, None]
        return self._parallel.all_reduce(x_TD)


def route(logits_TX: torch.Tensor, per_token: int, *, normalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's experts by the router's logits; returns weights and expert numbers [T, per_token].

    A row's result must not depend on other rows. So the weights of a row are added one by one: the order in
    which `sum` adds them may depend on the number of rows.
    """
    weights_TC, experts_TC = torch.softmax(logits_TX.float(), dim=-1).topk(per_token, dim=-1)
    if normalised:
        total_T = weights_TC[:, 0].clone()
        for choice in range(1, per_token):
            total_T += weights_TC[:, choice]
        weights_TC = weights_TC / total_T[:, None]
    return weights_TC, experts_TC
