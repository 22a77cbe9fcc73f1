"""The compiled C++ kernels as ctypes sees them: one library per instruction set, and its call structures.

The structures declare the same fields in the same order as those of the same names in the C++ sources.
`hatch_build.py` compiles the libraries when the project is installed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Best first: a variant's name, and the flags of /proc/cpuinfo that it needs.
VARIANTS = {
    "avx512_bf16": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx2": ("avx2", "fma"),
}


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """One of VARIANTS, loaded."""

    variant: str
    functions: Any  # ctypes.CDLL


class LinearCall(ctypes.Structure):
    """Arguments of `phalanx_linear`; see linear.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("w", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("M", ctypes.c_long), ("N", ctypes.c_long), ("K", ctypes.c_long), ("gated", ctypes.c_int),
    )  # fmt: skip


class AttentionCall(ctypes.Structure):
    """Arguments of `phalanx_attend`; see attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "qkv", "out", "keys", "values", "cos", "sin", "q_norm", "k_norm",
            "positions", "sequences", "tables",
        )),
        *((name, ctypes.c_long) for name in ("T", "B", "H", "K", "E", "stride", "window")),
        ("eps", ctypes.c_float), ("scale", ctypes.c_float),
    )  # fmt: skip


class PackCall(ctypes.Structure):
    """Arguments of `phalanx_pack`; see weights.cpp."""

    _fields_ = (
        ("w", ctypes.c_void_p), ("rows", ctypes.c_void_p), ("first", ctypes.c_long),
        ("count", ctypes.c_long), ("K", ctypes.c_long), ("gate", ctypes.c_long),
    )  # fmt: skip


def open_library(variant: str) -> NativeLibrary:
    """Load one of VARIANTS. Raises OSError when it has not been built."""
    library = ctypes.CDLL(str(Path(__file__).with_name(f"cpu_{variant}.so")))
    library.phalanx_panel_bytes.restype = ctypes.c_long
    library.phalanx_panel_bytes.argtypes = (ctypes.c_int, ctypes.c_long)
    pointer, long = ctypes.c_void_p, ctypes.c_long
    library.phalanx_unpack.argtypes = (ctypes.c_int, pointer, pointer, pointer, long, long, ctypes.c_int)
    library.phalanx_sample.argtypes = (pointer, pointer, pointer, long, long, ctypes.c_int)
    library.phalanx_add_rms_norm.argtypes = (
        pointer, pointer, pointer, pointer, long, long, ctypes.c_float, ctypes.c_int,
    )  # fmt: skip
    return NativeLibrary(variant, library)


def cpu_flags() -> set[str]:
    """The instruction sets of this CPU, as Linux names them; empty on other systems."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    lines = (line for line in info.read_text().splitlines() if line.startswith("flags"))
    return set(next(lines, ":").partition(":")[2].split())
