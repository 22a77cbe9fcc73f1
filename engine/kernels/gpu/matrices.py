"""Weights on a GPU: as they are, or as int8 or float8 with a scale for each row."""

from __future__ import annotations

import torch

from engine.kernels.gpu.rows import widen

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # number that each can hold
KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class QuantisedMatrix:
    """Rows of 8-bit numbers, each with a float32 scale."""

    def __init__(self, rows: int, columns: int, kind: str, device: torch.device) -> None:
        self.weight = torch.zeros(rows, columns, dtype=KINDS[kind], device=device)
        self.scale_N = torch.ones(rows, device=device)

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.weight.nbytes + self.scale_N.nbytes

    def write(self, row: int, values_RC: torch.Tensor) -> None:
        """Round rows: the largest number of each becomes the largest that the type holds."""
        most = LARGEST[self.weight.dtype]
        values = values_RC.to(self.weight.device, torch.float32)
        scale = (values.abs().amax(1) / most).clamp_min(torch.finfo(torch.float32).tiny)
        scaled = values / scale[:, None]
        if self.weight.dtype == torch.int8:
            scaled = scaled.round()
        rows = slice(row, row + values.shape[0])
        self.weight[rows], self.scale_N[rows] = scaled.to(self.weight.dtype), scale

    def widened(self, dtype: torch.dtype) -> torch.Tensor:
        """All that it holds, for a product with so many rows that arithmetic takes longer than this."""
        return widen(self.weight, self.scale_N, dtype)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What some rows hold, widened."""
        wide = self.weight.view(torch.uint8)[ids].view(self.weight.dtype).float()
        return (wide * self.scale_N[ids, None]).to(dtype)
