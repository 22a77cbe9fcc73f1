"""A wrapper around kernels: a named profiler range for each call, and the bytes that the call must move.

Ranges show up in torch's profiler and, on a GPU, as NVTX in Nsight Systems. Steps are not captured in CUDA
graphs meanwhile: a graph has no ranges inside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from engine.kernels.interface import AttentionInput, HeadNorms, Kernels, KVCache, Matrix, Rope
from engine.kernels.sample import SampleSpec

PREFIX = "phalanx: "


class Annotated:
    """`engine.kernels.interface.Kernels` around others. Counts nothing until `counting`."""

    capturable = False

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.counting = False
        self._bytes: defaultdict[str, int] = defaultdict(int)
        self._attended: list[tuple[str, torch.Tensor, int]] = []  # sequences of a step, bytes per token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def bytes_by_stage(self) -> dict[str, int]:
        """Bytes that each stage had to read and write."""
        total = dict(self._bytes)
        for stage, sequences_B4, per_token in self._attended:
            starts, counts = sequences_B4[:, 3].sum(), sequences_B4[:, 2].sum()
            total[stage] = total.get(stage, 0) + int(starts + counts) * per_token
        return total

    def linear(self, x_TD: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See Kernels."""
        with self._stage(f"linear of {_mb(matrix)}, {_rows(x_TD)}") as moved:
            out = self._kernels.linear(x_TD, matrix, bias)
            moved(matrix, x_TD, out)
        return out

    def swiglu(self, x_TD: torch.Tensor, gate_up: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See Kernels."""
        with self._stage(f"swiglu of {_mb(gate_up)}, {_rows(x_TD)}") as moved:
            out = self._kernels.swiglu(x_TD, gate_up, bias)
            moved(gate_up, x_TD, out)
        return out

    def embed(self, ids_T: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """See Kernels."""
        with self._stage(f"embed, {_rows(ids_T)}") as moved:
            out = self._kernels.embed(ids_T, matrix)
            moved(out, out)
        return out

    def add_rms_norm(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See Kernels."""
        with self._stage(f"add and norm, {_rows(x_TD)}") as moved:
            out = self._kernels.add_rms_norm(x_TD, delta_TD, weight_D, eps)
            moved(*([x_TD] if delta_TD is None else [x_TD, x_TD, delta_TD]), out)
        return out

    def attend(
        self,
        qkv_TA: torch.Tensor,
        cache: KVCache,
        layer: int,
        inputs: AttentionInput,
        rope: Rope,
        *,
        window: int | None = None,
        norms: HeadNorms | None = None,
    ) -> torch.Tensor:
        """See Kernels."""
        stage = f"attention, {_rows(qkv_TA)}"
        with self._stage(stage) as moved:
            out = self._kernels.attend(qkv_TA, cache, layer, inputs, rope, window=window, norms=norms)
            moved(qkv_TA, out)
        if self.counting:
            per_token = (qkv_TA.shape[1] - out.shape[1]) * cache.dtype.itemsize  # bytes of key and value
            self._attended.append((stage, inputs.sequences_B4, per_token))
        return out

    def sample(self, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        """See Kernels."""
        with self._stage(f"sample, {_rows(logits_SV)}") as moved:
            out = self._kernels.sample(logits_SV, specs)
            moved(logits_SV)
        return out

    @contextmanager
    def _stage(self, name: str) -> Iterator[Any]:
        def moved(*parts: Any) -> None:
            if self.counting:
                self._bytes[name] += sum(part.nbytes for part in parts)

        on_gpu = self._kernels.device.type == "cuda"
        if on_gpu:
            torch.cuda.nvtx.range_push(name)
        with torch.profiler.record_function(PREFIX + name):
            yield moved
        if on_gpu:
            torch.cuda.nvtx.range_pop()


def _mb(matrix: Matrix) -> str:
    return f"{matrix.nbytes / 1e6:.1f} MB"


def _rows(tensor: torch.Tensor) -> str:
    rows = tensor.shape[0]
    return f"{rows} row" if rows == 1 else f"{rows} rows"
