"""Every GPU kernel agrees with the reference: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.gpu import attention, rows
from engine.kernels.gpu.gemv import CANDIDATES, Tiles, gemv
from engine.kernels.gpu.kernels import GpuCache, GpuKernels
from engine.kernels.gpu.matrices import QuantisedMatrix
from engine.kernels.interface import HeadNorms
from engine.kernels.reference import ReferenceKernels
from tests.device import GPU
from tests.engine.heads import Heads, numbers

DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16 if GPU else torch.float16]  # the interpreter has no bfloat16
REFERENCE = ReferenceKernels(DEVICE, torch.float32)


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return numbers(*shape, seed=seed).to(DEVICE, dtype)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to a few roundings in the dtype of `got`."""
    error = 8 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(
        got.float(), wanted.float(), rtol=error, atol=error * (1 + wanted.abs().max().item())
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 33, 1000])
@pytest.mark.parametrize("adds", [True, False])
def test_norm_agrees_with_the_reference_and_adds_in_place(dtype: torch.dtype, size: int, adds: bool) -> None:
    weight, results = values(size, dtype=dtype), []
    for function in (rows.add_rms_norm, REFERENCE.add_rms_norm):
        x = values(5, size, seed=1, dtype=dtype)
        delta = values(5, size, seed=2, dtype=dtype) if adds else None
        results.append((function(x, delta, weight, 1e-5), x))
    for got, wanted in zip(*results, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [48, 1500])
def test_the_gate_agrees_with_torch(dtype: torch.dtype, size: int) -> None:
    both = values(7, 2 * size, dtype=dtype)
    gate, up = both.chunk(2, -1)
    close(rows.silu_mul(both), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 70])
@pytest.mark.parametrize("tiles", [CANDIDATES[-1], Tiles(16, 64, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_of_few_rows_agrees_with_torch(
    dtype: torch.dtype, m: int, tiles: Tiles, bias: bool
) -> None:
    x, weight = values(m, 300, dtype=dtype), values(77, 300, seed=1, dtype=dtype)
    b = values(77, seed=2, dtype=dtype) if bias else None
    wanted = torch.nn.functional.linear(x.float(), weight.float(), None if b is None else b.float())
    close(gemv(x, weight, b, tiles), wanted)


QUANTISED = ["int8", "fp8"] if GPU else ["int8"]  # the interpreter has no float8


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("m", [1, 20, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_matrix_is_multiplied_as_what_it_holds(kind: str, m: int, bias: bool) -> None:
    kernels, weight = GpuKernels(DEVICE, torch.float32, kind), values(40, 96, seed=1)
    matrix = kernels.matrix(40, 96)
    matrix.write(0, weight[:30])
    matrix.write(30, weight[30:])
    assert matrix.nbytes == 40 * (96 + 4)
    stored = kernels.embed(torch.arange(40, device=DEVICE), matrix)
    share = {"int8": 1 / 127, "fp8": 1 / 16}[kind]
    assert (stored - weight).abs().max() <= share * weight.abs().max()
    x, b = values(m, 96), values(40, seed=2) if bias else None
    torch.testing.assert_close(
        kernels.linear(x, matrix, b), torch.nn.functional.linear(x, stored, b), rtol=1e-4, atol=1e-4
    )


def test_a_matrix_may_stay_unquantised() -> None:
    kernels = GpuKernels(DEVICE, torch.float32, "int8")
    assert kernels.matrix(40, 96, quantise=False).nbytes == 40 * 96 * 4


SHAPES = [(9, 3, 64, 70), (8, 1, 32, None), (4, 4, 16, 1), (14, 2, 10, None), (2, 1, 128, 70)]


@pytest.mark.parametrize(("heads", "kv_heads", "size", "window"), SHAPES)
def test_attention_agrees_with_the_reference(
    heads: int, kv_heads: int, size: int, window: int | None
) -> None:
    data = Heads(heads, kv_heads, size, 150, DEVICE)
    norms = HeadNorms(1 + values(size, seed=3) / 8, 1 + values(size, seed=4) / 8, 1e-6)
    kernels = GpuKernels(DEVICE, torch.float32)
    ours, expected = data.cache(kernels), data.cache(REFERENCE)
    for parts in (
        [(0, 0, 40), (1, 0, 7)],
        [(1, 7, 8), (0, 40, 129), (2, 0, 33)],
        [(0, 129, 150), (2, 33, 34), (1, 8, 20)],
        [(1, 20, 21), (2, 34, 35)],
    ):
        pairs = zip(
            data.step(kernels, ours, parts, window=window, norms=norms),
            data.step(REFERENCE, expected, parts, window=window, norms=norms),
            strict=True,
        )
        for got, wanted in pairs:
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("splits", [1, 2, 32])
def test_the_number_of_splits_changes_no_result(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, kernels = Heads(4, 2, 32, 150, DEVICE), GpuKernels(DEVICE, torch.float32)
    cache, expected = data.cache(kernels), data.cache(REFERENCE)
    monkeypatch.setattr(attention, "splits_for", lambda *_: splits)
    for parts in ([(0, 0, 149), (1, 0, 3)], [(0, 149, 150), (1, 3, 4), (2, 0, 1)]):
        got = data.step(kernels, cache, parts)
        for ours, wanted in zip(got, data.step(REFERENCE, expected, parts), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=2e-5, atol=2e-5)


def test_half_the_bits_cost_no_more_than_their_rounding() -> None:
    dtype = DTYPES[1]
    data, kernels = Heads(6, 2, 64, 96, DEVICE), GpuKernels(DEVICE, dtype)
    expected = data.step(REFERENCE, data.cache(REFERENCE), [(0, 0, 95)]) + data.step(
        REFERENCE, REFERENCE.cache(2, 2, 64, 18), [(0, 0, 96)]
    )
    data.qkv = data.qkv.to(dtype)
    cache = data.cache(kernels)
    first, last = data.step(kernels, cache, [(0, 0, 95)])[0], data.step(kernels, cache, [(0, 95, 96)])[0]
    torch.testing.assert_close(first.float(), expected[0], rtol=0, atol=8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(last.float(), expected[1][95:], rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_rows_that_pad_a_graph_write_nothing() -> None:
    data, kernels = Heads(4, 2, 32, 40, DEVICE), GpuKernels(DEVICE, torch.float32)
    cache = data.cache(kernels)
    assert isinstance(cache, GpuCache)
    wanted = data.step(kernels, cache, [(0, 0, 20), (1, 0, 1)])[1]
    before = cache.keys_NBKPE.clone(), cache.values_NBKPE.clone()
    inputs = data.inputs([(1, 0, 1)])
    inputs.slots_T[:] = -1
    inputs.sequences_B4[:, 2] = 0
    kernels.attend(data.qkv[1, :1].clone(), cache, 1, inputs, data.rope)
    assert torch.equal(cache.keys_NBKPE, before[0])
    assert torch.equal(cache.values_NBKPE, before[1])
    assert torch.equal(data.step(kernels, cache, [(1, 0, 1)])[0], wanted)


@pytest.mark.parametrize(
    ("sequences", "kv_heads", "splits"), [(1, 8, 32), (1, 32, 8), (8, 8, 4), (32, 8, 1), (256, 8, 1)]
)
def test_small_batches_split_their_keys_over_all_multiprocessors(
    sequences: int, kv_heads: int, splits: int
) -> None:
    assert attention.splits_for(sequences, kv_heads, 132) == splits


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_is_dequantised_as_its_rows_are(kind: str, dtype: torch.dtype) -> None:
    matrix = QuantisedMatrix(9, 70, kind, DEVICE)
    matrix.write(0, values(9, 70))
    assert torch.equal(matrix.dequantised(dtype), matrix.rows(torch.arange(9, device=DEVICE), dtype))
