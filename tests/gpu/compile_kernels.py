"""Compiles every GPU kernel to machine code for a GPU that need not be here; prints each one's name.

The interpreter lets pass what the compiler does not: values that change their type, branches that disagree.
Run as a process of its own, since Triton decides at its import whether it interprets.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.gpu import attention, draw, gemv, rows

HOPPER = GPUTarget("cuda", 90, 32)
BF16, F32, I32, WHOLE = "*bf16", "*fp32", "*i32", "i32"
HEADS = {"H": 32, "K": 8, "E": 128}


def check(kernel: Any, arguments: list[str], options: dict[str, int] | None = None, **constants: Any) -> None:
    """Compile one, for arguments of these types in their order, and with every number that may be 1 being 1.

    An argument that is 1 is a constant to Triton, of another type than others.
    """
    names = [name for name in kernel.arg_names if name not in constants]
    assert len(names) == len(arguments), (kernel.__name__, names)
    ones = {
        name: 1
        for name, kind in zip(names, arguments, strict=True)
        if kind == WHOLE and name not in kernel.do_not_specialize
    }
    _compile(kernel, dict(zip(names, arguments, strict=True)), options, constants)
    if ones:
        left = {name: kind for name, kind in zip(names, arguments, strict=True) if name not in ones}
        _compile(kernel, left, options, constants | ones)


def _compile(
    kernel: Any, arguments: dict[str, str], options: dict[str, int] | None, constants: dict[str, int]
) -> None:
    signature = dict.fromkeys(constants, "constexpr") | arguments
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=HOPPER, options=options or {})
    print(kernel.__name__, len(compiled.asm["cubin"]))


def main() -> None:
    """Compile all."""
    row = [BF16, BF16, BF16, BF16, WHOLE, "fp32"]
    check(rows._add_rms_norm, row, ADD=True, BLOCK=4096)
    check(rows._silu_mul, [BF16, BF16, WHOLE], TILE=1024)
    check(rows._masked_softmax, [F32, I32, F32, WHOLE, "fp32"], BLOCK=1024)
    enter = [BF16, BF16, BF16, F32, F32, BF16, BF16, I32, I32, I32, WHOLE, "fp32", WHOLE]
    check(attention._enter, enter, **HEADS, P=16, HALF=64, NORM=True, ROWS=8)
    for window in (0, 4096):
        decode = [BF16, BF16, BF16, F32, F32, I32, I32, WHOLE, "fp32", WHOLE]
        check(attention._decode, decode, **HEADS, SPLITS=4, E_PAD=128, WINDOW=window, P=16, TILE=64, G_PAD=16)
        prefill = [BF16, BF16, BF16, BF16, I32, I32, WHOLE, "fp32"]
        check(attention._prefill, prefill, **HEADS, E_PAD=128, WINDOW=window, P=16, QUERIES=64, TILE=64)
    check(attention._add_up, [F32, F32, BF16, I32, WHOLE], **HEADS, SPLITS=4, E_PAD=128)
    product = [BF16, BF16, BF16, F32, BF16, WHOLE, WHOLE, WHOLE, WHOLE]
    for m, stored in ((1, BF16), (16, BF16), (1, "*i8"), (64, "*i8"), (16, "*fp8e4nv")):
        product[1] = stored
        cut = {"ROWS": 8 if m == 1 else 64, "COLUMNS": 512 if m == 1 else 128}
        check(gemv._gemv, product, BIAS=True, SCALE=stored != BF16, **cut, M_PAD=m)
    for stored in ("*i8", "*fp8e4nv"):
        check(rows._widen, [stored, F32, BF16, WHOLE], TILE=4096)
    check(gemv._add_parts, [F32, BF16, BF16, WHOLE, WHOLE], BIAS=True, SPLITS=4, TILE=1024)
    check(
        draw._draw,
        [F32, I32, "*i64", WHOLE, WHOLE],
        {"num_warps": draw.MOST_TILE // draw.TILE_OF_WARP},
        ROW=draw.ROW,
        TILE=draw.MOST_TILE,
    )


if __name__ == "__main__":
    main()
