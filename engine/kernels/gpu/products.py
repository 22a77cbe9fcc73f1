"""Products of activations and weights on a GPU: by `gemv` with some tiles, or by cuBLAS."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from triton.runtime.errors import TritonError

from engine.kernels.gpu.gemv import MAX_ROWS, TILE_ROWS, Tiles, gemv
from engine.kernels.gpu.matrices import QuantisedMatrix
from engine.kernels.gpu.tuning import Shape, Tuner, cache_path
from engine.kernels.reference import ReferenceMatrix

MEASURED_ROWS = (1, 2, 4, 8, TILE_ROWS)  # of x
_DEFAULT_TILES = Tiles(64, 128, 1)  # for shapes that are not measured
_TIMED_RUNS = 20  # of a product that is measured
_WARM_UP_S = 0.03  # of work before a product is timed
_FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU

GpuMatrix = ReferenceMatrix | QuantisedMatrix


class Products:
    """Multiplies by matrices, each product in the way that is fastest for its shape.

    Owns: the tuner. Does not own: the matrices.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.tuner: Tuner | None = None  # None in Triton's interpreter, where nothing is worth measuring
        if device.type == "cuda":
            gpu = torch.cuda.get_device_properties(device).name
            name = f"{gpu}, torch {torch.__version__}, Triton {triton.__version__}"
            self.tuner = Tuner(name, cache_path(name))

    def multiply(self, x_MK: torch.Tensor, matrix: GpuMatrix, bias_N: torch.Tensor | None) -> torch.Tensor:
        """The product x W^T + b, [M, N]."""
        return _multiply(x_MK, matrix, bias_N, self._tiles(x_MK, matrix))

    def measure(self, matrix: GpuMatrix, dtype: torch.dtype) -> None:
        """Choose the tiles of a matrix for every number of rows that is measured."""
        for m in MEASURED_ROWS:
            self._tiles(torch.zeros(m, matrix.weight.shape[1], dtype=dtype, device=self._device), matrix)

    def _tiles(self, x_MK: torch.Tensor, matrix: GpuMatrix) -> Tiles | None:
        """The tiles of a product; None for cuBLAS."""
        M, (N, K) = x_MK.shape[0], matrix.weight.shape
        quantised = isinstance(matrix, QuantisedMatrix)
        if self.tuner is None or M > TILE_ROWS:
            return _DEFAULT_TILES if quantised and M <= MAX_ROWS else None
        m = triton.next_power_of_2(M)
        kind = str(matrix.weight.dtype if quantised else x_MK.dtype).removeprefix("torch.")

        def seconds(tiles: Tiles | None) -> float:
            x = torch.zeros(m, K, dtype=x_MK.dtype, device=self._device)
            try:
                return _median_seconds(lambda: _multiply(x, matrix, None, tiles))
            except TritonError:  # these tiles need more shared memory or registers than this GPU has
                return math.inf

        return self.tuner.choose(Shape(m, N, K, kind), seconds)


def _multiply(
    x_MK: torch.Tensor, matrix: GpuMatrix, bias_N: torch.Tensor | None, tiles: Tiles | None
) -> torch.Tensor:
    """The product with some tiles, or by cuBLAS, which needs a quantised matrix dequantised."""
    if isinstance(matrix, QuantisedMatrix):
        if tiles is None:
            return F.linear(x_MK, matrix.dequantised(x_MK.dtype), bias_N)
        return gemv(x_MK, matrix.weight, bias_N, tiles, matrix.scale_N)
    return (
        F.linear(x_MK, matrix.weight, bias_N) if tiles is None else gemv(x_MK, matrix.weight, bias_N, tiles)
    )


def _median_seconds(work: Callable[[], object]) -> float:
    """The median time of some work on the GPU, over several runs, each with a cold L2 cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    end = time.monotonic() + _WARM_UP_S
    while time.monotonic() < end:  # a GPU that was idle while Triton compiled has lowered its clock
        flush.zero_()
        work()
        torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(_TIMED_RUNS):
        flush.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        work()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(times)
