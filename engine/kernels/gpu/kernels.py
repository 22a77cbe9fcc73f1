"""`engine.kernels.Kernels` on a GPU. Shapes as there."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import triton
from triton.runtime.errors import TritonError

from engine.config import BLOCK_SIZE
from engine.kernels import AttentionInput, HeadNorms, KVCache, Matrix, Rope
from engine.kernels.gpu import attention, rows
from engine.kernels.gpu.gemv import MOST_ROWS, TILE_ROWS, Tiles, gemv
from engine.kernels.gpu.matrices import QuantisedMatrix
from engine.kernels.gpu.sample import SPEC_INTS, pack, sample
from engine.kernels.gpu.tuning import Shape, Tuner, cache_path
from engine.kernels.reference import ReferenceMatrix
from engine.kernels.sample import SampleSpec
from engine.kernels.transfer import to_device

_MEASURED_ROWS = (1, 2, 4, 8, TILE_ROWS)
_PLAIN = Tiles(64, 128, 1)  # where nothing was measured
_TIMED = 20  # runs of a product that is measured
_WARM_S = 0.03  # of work before a product is timed
_L2_BYTES = 256 << 20  # more than any has


GpuMatrix = ReferenceMatrix | QuantisedMatrix


class GpuCache:
    """Keys and values per layer, [blocks, K, P, E]: see `attention`."""

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (layers, blocks, kv_heads, BLOCK_SIZE, head_dim)
        self.dtype = dtype
        self.keys_NBKPE = torch.zeros(shape, dtype=dtype, device=device)
        self.values_NBKPE = torch.zeros(shape, dtype=dtype, device=device)

    def copy_blocks(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy blocks in order, in every layer."""
        for source, destination in pairs:
            for cache in (self.keys_NBKPE, self.values_NBKPE):
                cache[:, destination] = cache[:, source]


class GpuKernels:
    """See `engine.kernels.Kernels`."""

    capturable = True
    torch_threads = 1

    def __init__(self, device: torch.device, dtype: torch.dtype, quantisation: str = "") -> None:
        self.device, self.activation_dtype, self._quantisation = device, dtype, quantisation
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            gpu, self._processors = properties.name, properties.multi_processor_count
            name = f"{gpu}, torch {torch.__version__}, Triton {triton.__version__}"
            self._tuner: Tuner | None = Tuner(name, cache_path(name))
        else:  # Triton's interpreter
            gpu, self._processors, self._tuner = "no GPU", 1, None
        self._matrices: dict[tuple[int, int, bool], GpuMatrix] = {}  # one of each shape
        self.name = f"Triton on {gpu}, {quantisation or str(dtype).removeprefix('torch.')}"

    def matrix(self, rows: int, columns: int, *, gated: bool = False, quantise: bool = True) -> Matrix:
        """An empty matrix."""
        made: GpuMatrix
        quantise = quantise and bool(self._quantisation)
        if quantise:
            made = QuantisedMatrix(rows, columns, self._quantisation, self.device)
        else:
            made = ReferenceMatrix(rows, columns, self.activation_dtype, self.device)
        self._matrices.setdefault((rows, columns, quantise), made)
        return made

    def linear(self, x_TD: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product x W^T + b."""
        assert isinstance(matrix, ReferenceMatrix | QuantisedMatrix)
        return _product(x_TD, matrix, bias, self._tiles(x_TD, matrix))

    def swiglu(self, x_TD: torch.Tensor, gate_up: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """silu(gate(x)) * up(x)."""
        return rows.silu_mul(self.linear(x_TD, gate_up, bias))

    def embed(self, ids_T: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Rows of a matrix."""
        if isinstance(matrix, QuantisedMatrix):
            return matrix.rows(ids_T, self.activation_dtype)
        assert isinstance(matrix, ReferenceMatrix)
        return F.embedding(ids_T, matrix.weight)

    def add_rms_norm(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add in place; the norm of the sum."""
        return rows.add_rms_norm(x_TD, delta_TD, weight_D, eps)

    def cache(self, layers: int, kv_heads: int, head_dim: int, blocks: int) -> KVCache:
        """An empty cache."""
        return GpuCache(layers, kv_heads, head_dim, blocks, self.activation_dtype, self.device)

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
        """Causal attention."""
        assert isinstance(cache, GpuCache)
        keys, values = cache.keys_NBKPE[layer], cache.values_NBKPE[layer]
        K, E = keys.shape[1], keys.shape[3]
        out_TA = torch.empty(
            qkv_TA.shape[0], qkv_TA.shape[1] - 2 * K * E, dtype=qkv_TA.dtype, device=qkv_TA.device
        )
        attention.enter(qkv_TA, keys, values, inputs, rope, norms)
        if inputs.single_queries:
            splits = attention.splits_for(inputs.single_queries, K, self._processors)
            attention.decode(qkv_TA, keys, values, inputs, out_TA, window=window, splits=splits)
        if inputs.most_queries > 1:
            attention.prefill(qkv_TA, keys, values, inputs, out_TA, window=window)
        return out_TA

    def sample(self, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        """Sample a token id per row."""
        return sample(logits_SV, to_device(pack(specs), self.device).view(-1, SPEC_INTS))

    def warm(self) -> None:
        """Measure how the products with few rows are best computed."""
        for matrix in self._matrices.values():
            for m in _MEASURED_ROWS:
                x_MK = torch.zeros(m, matrix.weight.shape[1], dtype=self.activation_dtype, device=self.device)
                self._tiles(x_MK, matrix)

    def _tiles(self, x_MK: torch.Tensor, matrix: GpuMatrix) -> Tiles | None:
        """How a product is cut; None for cuBLAS."""
        M, (N, K) = x_MK.shape[0], matrix.weight.shape
        quantised = isinstance(matrix, QuantisedMatrix)
        if self._tuner is None or M > TILE_ROWS:
            return _PLAIN if quantised and M <= MOST_ROWS else None
        m = triton.next_power_of_2(M)
        kind = str(matrix.weight.dtype if quantised else x_MK.dtype).removeprefix("torch.")

        def seconds(tiles: Tiles | None) -> float:
            x = torch.zeros(m, K, dtype=x_MK.dtype, device=self.device)
            try:
                return _seconds(lambda: _product(x, matrix, None, tiles))
            except TritonError:  # more shared memory or registers than this GPU has
                return math.inf

        return self._tuner.choose(Shape(m, N, K, kind), seconds)


def _product(
    x_MK: torch.Tensor, matrix: GpuMatrix, bias_N: torch.Tensor | None, tiles: Tiles | None
) -> torch.Tensor:
    """The product x W^T + b: in tiles, or by cuBLAS, for which a quantised matrix is widened first."""
    if isinstance(matrix, QuantisedMatrix):
        if tiles is None:
            return F.linear(x_MK, matrix.widened(x_MK.dtype), bias_N)
        return gemv(x_MK, matrix.weight, bias_N, tiles, matrix.scale_N)
    return (
        F.linear(x_MK, matrix.weight, bias_N) if tiles is None else gemv(x_MK, matrix.weight, bias_N, tiles)
    )


def _seconds(work: Callable[[], object]) -> float:
    """Time of some work on the GPU, the median of several runs, each with a cold L2 cache."""
    flush = torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda")
    end = time.monotonic() + _WARM_S
    while time.monotonic() < end:  # a GPU that waited for a compiler has slowed down
        flush.zero_()
        work()
        torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(_TIMED):
        flush.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        work()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(times)
