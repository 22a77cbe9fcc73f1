"""The kernels of the C++ sources here, called through ctypes: x86-64 CPUs, in float32, bf16, int8 and int4.

Weights are packed into panels of 16 rows while they are loaded; int8 has a scale per row, int4 one per
row and 64 columns. Activations and sums are float32. One library per instruction set is built when the
project is installed; the first that this CPU has, and whose products are right, is taken.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from engine.config import BLOCK_SIZE
from engine.kernels import AttentionInput, HeadNorms, KVCache, Matrix, Rope
from engine.kernels.sample import GREEDY_BELOW, SampleSpec, noise_key

_log = logging.getLogger(__name__)

_PANEL = 16
_F32, _BF16 = 0, 1
_FORMATS = {"float32": _F32, "bfloat16": _BF16, "int8": 2, "int4": 3}
# Best first: the name of the library, and the flags of /proc/cpuinfo that it needs.
VARIANTS = {
    "avx512_bf16": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx2": ("avx2", "fma"),
}


class _LinearCall(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p), ("w", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("M", ctypes.c_long), ("N", ctypes.c_long), ("K", ctypes.c_long), ("gated", ctypes.c_int),
    )  # fmt: skip


class _AttentionCall(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "qkv", "out", "keys", "values", "cos", "sin", "q_norm", "k_norm",
            "positions", "sequences", "tables",
        )),
        *((name, ctypes.c_long) for name in ("T", "B", "H", "K", "E", "stride", "window")),
        ("eps", ctypes.c_float), ("scale", ctypes.c_float),
    )  # fmt: skip


class _Spec(ctypes.Structure):
    _fields_ = (
        ("temperature", ctypes.c_float), ("top_p", ctypes.c_float), ("log_min_p", ctypes.c_float),
        ("top_k", ctypes.c_int32), ("low", ctypes.c_uint32), ("high", ctypes.c_uint32),
    )  # fmt: skip


class _PackCall(ctypes.Structure):
    _fields_ = (
        ("w", ctypes.c_void_p), ("rows", ctypes.c_void_p), ("first", ctypes.c_long),
        ("count", ctypes.c_long), ("K", ctypes.c_long), ("gate", ctypes.c_long),
    )  # fmt: skip


def open_library(name: str) -> Any:
    """The library of one of VARIANTS. Raises OSError when it has not been built."""
    library = ctypes.CDLL(str(Path(__file__).with_name(f"cpu_{name}.so")))
    library.phalanx_panel_bytes.restype = ctypes.c_long
    library.phalanx_panel_bytes.argtypes = (ctypes.c_int, ctypes.c_long)
    pointer, whole = ctypes.c_void_p, ctypes.c_long
    library.phalanx_unpack.argtypes = (ctypes.c_int, pointer, pointer, pointer, whole, whole, ctypes.c_int)
    library.phalanx_sample.argtypes = (pointer, pointer, pointer, whole, whole, ctypes.c_int)
    library.phalanx_add_rms_norm.argtypes = (
        pointer, pointer, pointer, pointer, whole, whole, ctypes.c_float, ctypes.c_int,
    )  # fmt: skip
    return library


@cache
def library() -> tuple[str, Any] | None:
    """The best variant for this CPU and its name; None where there is none."""
    flags = cpu_flags()
    for name, needed in VARIANTS.items():
        if not flags.issuperset(needed):
            continue
        try:
            candidate = open_library(name)
        except OSError as error:
            _log.warning("no native kernels for %s: %s", name, error)
            continue
        if _is_right(candidate):
            return name, candidate
        _log.warning("native kernels for %s compute wrong products on this CPU", name)
    return None


def cpu_flags() -> set[str]:
    """What this CPU can do, as Linux names it; nothing on other systems."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    lines = (line for line in info.read_text().splitlines() if line.startswith("flags"))
    return set(next(lines, ":").partition(":")[2].split())


def _is_right(candidate: Any) -> bool:
    """Whether a small product comes out right: a library meets CPUs that nobody had to test it on."""
    kernels = NativeKernels(torch.bfloat16, found=("", candidate))
    x = torch.arange(-48, 48, dtype=torch.float32).view(3, 32) / 16
    weight = (torch.arange(40 * 32).view(40, 32) % 17 - 8).float()
    matrix = kernels.matrix(40, 32)
    matrix.write(0, weight)
    return bool(torch.allclose(kernels.linear(x, matrix), x @ weight.T, atol=1e-2))


class NativeMatrix:
    """Panels of 16 rows; a gated matrix alternates panels of gate and up."""

    def __init__(self, lib: Any, threads: int, kind: int, rows: int, columns: int, gated: bool) -> None:
        if columns % 2:
            raise ValueError(f"{columns} columns: native matrices have an even number")
        self._lib, self._threads = lib, threads
        self.kind, self.rows, self.columns, self.gated = kind, rows, columns, gated
        panels = 2 * -(-rows // 2 // _PANEL) if gated else 2 * -(-rows // (2 * _PANEL))
        self.nbytes = panels * lib.phalanx_panel_bytes(kind, columns)
        # All of it is read in every step: fewer, larger pages are found sooner.
        self.data = _zeros(self.nbytes, huge_pages=True)

    def write(self, row: int, values_RC: torch.Tensor) -> None:
        """Pack rows, all columns of each, quantising where the format asks for it."""
        values = values_RC.float().contiguous()
        call = _PackCall(
            self.data.data_ptr(), values.data_ptr(), row, values.shape[0], self.columns,
            self.rows // 2 if self.gated else 0,
        )  # fmt: skip
        self._lib.phalanx_pack(self.kind, ctypes.byref(call), self._threads)


class NativeCache:
    """Per layer and block, a panel of keys and panels of values for each KV head."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, blocks: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kv_heads, self.head_dim = kv_heads, head_dim
        shape = (layers, blocks, kv_heads * -(-head_dim // _PANEL) * _PANEL * BLOCK_SIZE)
        size = layers * blocks * shape[2] * dtype.itemsize
        self.keys, self.values = (_zeros(size).view(dtype).view(shape) for _ in range(2))

    def copy_blocks(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy blocks in order, in every layer."""
        for source, destination in pairs:
            for blocks in (self.keys, self.values):
                blocks[:, destination] = blocks[:, source]


class NativeKernels:
    """See `engine.kernels.Kernels`."""

    device = torch.device("cpu")
    activation_dtype = torch.float32
    capturable = False
    torch_threads = 1  # or its waiting threads would keep the cores from ours

    def __init__(
        self,
        dtype: torch.dtype,
        quantisation: str = "",
        *,
        threads: int = 1,
        found: tuple[str, Any] | None = None,
    ) -> None:
        found = found or library()
        if found is None:
            raise RuntimeError("there are no native kernels for this CPU")
        variant, self._lib = found
        self._dtype, self._threads = dtype, threads
        name = str(dtype).removeprefix("torch.")
        self._kind = _FORMATS[name]
        self._quantised = _FORMATS[quantisation or name]
        self.name = f"native {variant}, {quantisation or name}, {threads} threads"

    def matrix(self, rows: int, columns: int, *, gated: bool = False, quantise: bool = True) -> Matrix:
        """An empty matrix."""
        return NativeMatrix(
            self._lib, self._threads, self._quantised if quantise else self._kind, rows, columns, gated
        )

    def linear(self, x_TD: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product x W^T + b."""
        return self._product(x_TD, matrix, bias, gated=False)

    def swiglu(self, x_TD: torch.Tensor, gate_up: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        """silu(gate(x)) * up(x)."""
        return self._product(x_TD, gate_up, bias, gated=True)

    def embed(self, ids_T: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Rows of a matrix."""
        assert isinstance(matrix, NativeMatrix)
        ids = ids_T.to(torch.int64).contiguous()
        out = torch.empty(ids.shape[0], matrix.columns)
        self._lib.phalanx_unpack(
            matrix.kind, matrix.data.data_ptr(), ids.data_ptr(), out.data_ptr(), ids.shape[0], matrix.columns,
            self._threads,
        )  # fmt: skip
        return out

    def add_rms_norm(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add in place; the norm of the sum."""
        out_TD = torch.empty_like(x_TD)
        self._lib.phalanx_add_rms_norm(
            x_TD.data_ptr(), None if delta_TD is None else delta_TD.data_ptr(), weight_D.data_ptr(),
            out_TD.data_ptr(), x_TD.shape[0], x_TD.shape[1], eps, self._threads,
        )  # fmt: skip
        return out_TD

    def cache(self, layers: int, kv_heads: int, head_dim: int, blocks: int) -> KVCache:
        """An empty cache."""
        return NativeCache(layers, kv_heads, head_dim, blocks, self._dtype)

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
        assert isinstance(cache, NativeCache)
        K, E, T = cache.kv_heads, cache.head_dim, qkv_TA.shape[0]
        H = qkv_TA.shape[1] // E - 2 * K
        out_TA = torch.empty(T, H * E)
        call = _AttentionCall(
            qkv_TA.data_ptr(), out_TA.data_ptr(),
            cache.keys[layer].data_ptr(), cache.values[layer].data_ptr(),
            rope.cos.data_ptr(), rope.sin.data_ptr(),
            None if norms is None else norms.query.data_ptr(),
            None if norms is None else norms.key.data_ptr(),
            inputs.positions_T.data_ptr(), inputs.sequences_B4.data_ptr(), inputs.tables.data_ptr(),
            T, inputs.sequences_B4.shape[0], H, K, E, inputs.tables.shape[1], window or 0,
            0.0 if norms is None else norms.eps, E**-0.5,
        )  # fmt: skip
        self._lib.phalanx_attend(self._kind, ctypes.byref(call), self._threads)
        return out_TA

    def warm(self) -> None:
        """Nothing: these were compiled long ago."""

    def sample(self, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        """Sample a token id per row."""
        logits_SV = logits_SV.contiguous()
        ids_S = torch.empty(len(specs), dtype=torch.int64)
        packed = (_Spec * len(specs))(*map(_pack_spec, specs))
        self._lib.phalanx_sample(
            logits_SV.data_ptr(), packed, ids_S.data_ptr(), len(specs), logits_SV.shape[1], self._threads
        )
        return ids_S

    def _product(
        self, x_TD: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None, gated: bool
    ) -> torch.Tensor:
        assert isinstance(matrix, NativeMatrix)
        assert matrix.gated == gated
        assert x_TD.is_contiguous()
        assert x_TD.shape[1] == matrix.columns
        rows = matrix.rows // 2 if gated else matrix.rows
        out = torch.empty(x_TD.shape[0], rows)
        call = _LinearCall(
            x_TD.data_ptr(), matrix.data.data_ptr(), None if bias is None else bias.data_ptr(),
            out.data_ptr(), x_TD.shape[0], rows, matrix.columns, gated,
        )  # fmt: skip
        self._lib.phalanx_linear(matrix.kind, ctypes.byref(call), self._threads)
        return out


def _pack_spec(spec: SampleSpec) -> _Spec:
    sampling, (low, high) = spec.sampling, noise_key(spec)
    if sampling.temperature < GREEDY_BELOW:
        return _Spec(0, 1, -math.inf, 0, low, high)
    log_min_p = math.log(sampling.min_p) if sampling.min_p else -math.inf
    return _Spec(sampling.temperature, sampling.top_p, log_min_p, sampling.top_k, low, high)


def _zeros(size: int, *, huge_pages: bool = False) -> torch.Tensor:
    """Zero bytes on pages of their own, given memory when first written."""
    pages = mmap.mmap(-1, max(size, 1))
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8, count=size)
