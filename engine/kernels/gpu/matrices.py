"""Quantised weights on a GPU: int8 or float8, with a float32 scale per row."""

from __future__ import annotations

import torch

from engine.kernels.gpu.rows import dequantise

MAX_VALUE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # largest number of each type
KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class QuantisedMatrix:
    """Rows of 8-bit numbers and their scales: weight = number * scale."""

    def __init__(self, rows: int, columns: int, kind: str, device: torch.device) -> None:
        self.weight = torch.zeros(rows, columns, dtype=KINDS[kind], device=device)
        self.scale_N = torch.ones(rows, device=device)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.weight.nbytes + self.scale_N.nbytes

    def write(self, row: int, values_RC: torch.Tensor) -> None:
        """Quantise rows. A row's scale maps its largest absolute value to the type's largest number."""
        largest = MAX_VALUE[self.weight.dtype]
        values = values_RC.to(self.weight.device, torch.float32)
        scale = (values.abs().amax(1) / largest).clamp_min(torch.finfo(torch.float32).tiny)
        scaled = values / scale[:, None]
        if self.weight.dtype == torch.int8:
            scaled = scaled.round()
        rows = slice(row, row + values.shape[0])
        self.weight[rows], self.scale_N[rows] = scaled.to(self.weight.dtype), scale

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole matrix in `dtype`: worth its time for products with many rows."""
        return dequantise(self.weight, self.scale_N, dtype)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of the matrix in `dtype`."""
        # torch cannot index float8 tensors: index their bytes.
        wide = self.weight.view(torch.uint8)[ids].view(self.weight.dtype).float()
        return (wide * self.scale_N[ids, None]).to(dtype)
