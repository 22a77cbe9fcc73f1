"""Which kernels run on a device: the implementation and, on CPUs, the instruction set."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch

from engine.errors import ModelError
from engine.kernels.interface import Kernels
from engine.kernels.native import NativeKernels
from engine.kernels.native_library import VARIANTS, NativeLibrary, cpu_flags, open_library
from engine.kernels.reference import ReferenceKernels

_log = logging.getLogger(__name__)

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def choose_kernels(
    device: torch.device, dtype: torch.dtype, quantisation: str = "", *, threads: int = 1
) -> Kernels:
    """The fastest kernels that run on a device. On a CPU they use `threads` threads.

    Raises:
        ModelError: INVALID_LAYOUT, when weights are to be quantised and only the reference runs.
    """
    if device.type == "cpu" and quantisation in ("", "int8", "int4") and dtype in _NATIVE_DTYPES:
        library = best_native_library()
        if library is not None:
            return NativeKernels(library, dtype, quantisation, threads=threads)
    if device.type == "cuda" and quantisation in ("", "int8", "fp8") and _has_triton():
        from engine.kernels.gpu.kernels import GpuKernels

        return GpuKernels(device, dtype, quantisation)
    if quantisation:
        raise ModelError(
            "INVALID_LAYOUT",
            f"{quantisation} weights are not for device {device.type} with dtype "
            f"{str(dtype).removeprefix('torch.')}: CPUs take int8 and int4 with float32 or bfloat16, "
            "GPUs int8 and fp8",
        )
    return ReferenceKernels(device, dtype, threads=threads)


@cache
def best_native_library() -> NativeLibrary | None:
    """The best variant of the native kernels that this CPU runs correctly; None where no variant does."""
    flags = cpu_flags()
    for variant, needed_flags in VARIANTS.items():
        if not flags.issuperset(needed_flags):
            continue
        try:
            library = open_library(variant)
        except OSError as error:
            _log.warning("no native kernels for %s: %s", variant, error)
            continue
        if _multiplies_correctly(library):
            return library
        _log.warning("native kernels for %s compute wrong products on this CPU", variant)
    return None


def _multiplies_correctly(library: NativeLibrary) -> bool:
    """Check a small product: this variant may never have been tested on such a CPU."""
    kernels = NativeKernels(library, torch.bfloat16)
    x = torch.arange(-48, 48, dtype=torch.float32).view(3, 32) / 16
    weight = (torch.arange(40 * 32).view(40, 32) % 17 - 8).float()
    matrix = kernels.matrix(40, 32)
    matrix.write(0, weight)
    return bool(torch.allclose(kernels.linear(x, matrix), x @ weight.T, atol=1e-2))


def _has_triton() -> bool:
    if find_spec("triton") is not None:
        return True
    _log.warning("Triton is not installed: all kernels run in plain torch, many times slower")
    return False
